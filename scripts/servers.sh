#!/usr/bin/env bash
# Installs the object stores that tests start, once: moto (S3) from PyPI and Azurite (Azure) from npm,
# into .venv-servers. Needs python3 and npm; takes half a minute and about 350 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.venv-servers
moto=5.2.5
azurite=3.37.0

if [ "$(cat $folder/versions 2>/dev/null || true)" = "moto $moto azurite $azurite" ]; then
  exit 0
fi
python3 -m venv $folder
$folder/bin/pip install --quiet --disable-pip-version-check "moto[s3]==$moto" flask flask-cors &
npm install --silent --no-audit --no-fund --prefix $folder "azurite@$azurite" &
wait %1
wait %2
echo "moto $moto azurite $azurite" > $folder/versions
