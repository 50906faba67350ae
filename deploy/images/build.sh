#!/usr/bin/env bash
# Builds an image: RUST=... BASE=... [ENGINE=podman] deploy/images/build.sh gpu|coordinator TAG
# RUST and BASE by digest (name@sha256:...), so that the same sources give the same programs.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
    echo "usage: RUST=name@sha256:... BASE=name@sha256:... $0 gpu|coordinator TAG" >&2
    exit 64
}

[ $# -eq 2 ] || usage
file=deploy/images/$1.Dockerfile
[ -f "$file" ] || usage
for name in RUST BASE; do
    if ! [[ ${!name:-} =~ @sha256:[0-9a-f]{64}$ ]]; then
        echo "$name=${!name:-} is not a digest: $(grep "^#   $name " "$file")" >&2
        exit 64
    fi
done
exec "${ENGINE:-docker}" build --file "$file" --tag "$2" --build-arg "RUST=$RUST" --build-arg "BASE=$BASE" .
