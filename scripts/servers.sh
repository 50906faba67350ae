#!/usr/bin/env bash
# Installs the object stores that tests start, once: moto (S3) from PyPI and Azurite (Azure) from npm,
# into .venv-servers. Takes half a minute and about 350 MB. Without npm there is no Azurite, and the
# tests that need it say that they skip.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.venv-servers
moto=5.2.5
azurite=3.37.0

if command -v npm >/dev/null; then
  wanted="moto $moto azurite $azurite"
else
  echo "npm is not installed: no Azurite, so nothing is tested against Azure's protocol" >&2
  wanted="moto $moto"
fi
if [ "$(cat $folder/versions 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi
python3 -m venv $folder
$folder/bin/pip install --quiet --disable-pip-version-check "moto[s3]==$moto" flask flask-cors &
pip=$!
if command -v npm >/dev/null; then
  npm install --silent --no-audit --no-fund --prefix $folder "azurite@$azurite"
fi
wait $pip
echo "$wanted" > $folder/versions
