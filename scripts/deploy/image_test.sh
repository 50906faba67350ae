#!/usr/bin/env bash
# Builds the images of deploy/images with podman and makes a run of configs/test.toml with them, twice: with
# `podman run` and as a Kubernetes Pod (`podman kube play`): image_test.sh FOLDER_WITH_BINARIES
#
# The Dockerfiles and build.sh are those of deploy/. No registry is needed: the bases are a Debian 12 from
# debootstrap. Two things are not done again in the image: `cargo build` takes the programs of the given
# folder, and pip puts the libtorch that they were linked against where the CUDA one would be.
# Needs root, podman, runc, debootstrap, patchelf and the network of Debian's packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -eq 1 ] || { echo "usage: $0 FOLDER_WITH_BINARIES" >&2; exit 64; }
for program in podman runc debootstrap patchelf strip; do
    if ! PATH=$PATH:/usr/sbin command -v "$program" >/dev/null; then
        echo "$program is missing: apt-get install --no-install-recommends podman runc catatonit" \
            "containernetworking-plugins debootstrap patchelf binutils" >&2
        exit 69
    fi
done
[ "$(id -u)" = 0 ] || { echo "debootstrap and cgroups want root" >&2; exit 77; }
export PATH=$PATH:/usr/sbin
BIN=$(cd "$1" && pwd)
TORCH=$(readlink -f "${LIBTORCH:-.libtorch}")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/duet
work=$(mktemp -d "${TMPDIR:-/var/tmp}/duet-image.XXXXXX")
cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
END
export CONTAINERS_CONF=$work/containers.conf
storage=(--root "$work/storage" --runroot "$work/run" --runtime runc --cgroup-manager cgroupfs
    --storage-driver "${STORAGE_DRIVER:-vfs}" --events-backend file)
pod() { podman "${storage[@]}" "$@"; }
end() {
    code=$?
    set +e
    if [ "$code" != 0 ]; then
        for name in $(pod ps -a --format '{{.Names}}' 2>/dev/null); do
            echo "== $name" && pod logs --tail 15 "$name"
        done
        tail -n 15 "$work/bootstrap.log" 2>/dev/null
    fi
    pod pod rm --all --force --time 1 >/dev/null 2>&1
    pod rm --all --force --time 1 >/dev/null 2>&1
    rm -rf "$work" || sleep 2 && rm -rf "$work"
    exit "$code"
}
trap end EXIT
say() { echo "--- $*"; }

# A Debian, once.
if [ ! -f "$cache/bookworm.tar" ]; then
    say "a Debian 12 for the bases"
    debootstrap --variant=minbase bookworm "$work/debian" http://deb.debian.org/debian >"$work/debootstrap.log"
    mkdir -p "$cache"
    tar -C "$work/debian" -cf "$cache/bookworm.tar.part" .
    mv "$cache/bookworm.tar.part" "$cache/bookworm.tar"
    rm -rf "$work/debian"
fi
pod import "$cache/bookworm.tar" localhost/debian >/dev/null

# The programs, as the image has them: linked against /opt/torch. `cargo build` hands them out.
mkdir -p "$work"/{rust/given,torch/given}
for program in duet duet-coordinator duet-rollout-worker duet-reward-worker duet-trainer; do
    strip -o "$work/rust/given/$program" "$BIN/$program"
    case $program in duet | duet-coordinator) continue ;; esac
    patchelf --set-rpath /opt/torch/torch/lib "$work/rust/given/$program"
done
cat >"$work/rust/cargo" <<'END'
#!/bin/sh
# In place of cargo: the programs that -p names, already built.
[ "$1 $2 $3" = "build --release --locked" ] && [ -f Cargo.lock ] || exit 64
mkdir -p target/release
for program in duet duet-coordinator duet-rollout-worker duet-reward-worker duet-trainer; do
    package=$program
    [ "$program" != duet ] || package=duet-cli
    case " $* " in *" -p $package "*) cp "/given/$program" target/release/ ;; esac
done
END
printf 'FROM localhost/debian\nCOPY given /given\nCOPY --chmod=0755 cargo /usr/local/bin/cargo\n' >"$work/rust/Dockerfile"
mkdir -p "$work/torch/given/torch/lib"
cp -L "$TORCH"/lib/*.so* "$work/torch/given/torch/lib/"
# libtorch looks for CUDA's libraries beside itself.
[ ! -d "$TORCH/../nvidia" ] || cp -rL "$TORCH/../nvidia" "$work/torch/given/"
cat >"$work/torch/python3" <<'END'
#!/bin/sh
# In place of `python3 -m venv FOLDER`: a pip that checks how it is asked, and puts libtorch there.
[ "$1 $2" = "-m venv" ] || exec /usr/bin/python3 "$@"
mkdir -p "$3/bin"
cat >"$3/bin/pip" <<'PIP'
#!/bin/sh
case " $* " in *" --no-deps "*" --require-hashes "*) ;; *) echo "pip $*: not by hash" >&2; exit 64 ;; esac
while [ "$1" != --target ]; do shift; done
mkdir -p "$2" && cp -r /given/. "$2/"
PIP
chmod 0755 "$3/bin/pip"
END
printf 'FROM localhost/debian\nCOPY given /given\nCOPY --chmod=0755 python3 /usr/local/bin/python3\n' >"$work/torch/Dockerfile"
build=(--format docker --layers=false --pull=never --network host --quiet)
pod build "${build[@]}" --tag localhost/rust "$work/rust" >/dev/null
pod build "${build[@]}" --tag localhost/torch "$work/torch" >/dev/null
rm -rf "$work/rust" "$work/torch"

# build.sh as a user calls it, with an engine that has the options this machine needs.
cat >"$work/engine" <<END
#!/bin/sh
[ "\$1" = build ] && shift
exec podman ${storage[*]} build ${build[*]} "\$@"
END
chmod 0755 "$work/engine"
digest() { echo "localhost/$1@$(pod image inspect --format '{{.Digest}}' "localhost/$1")"; }
RUST=$(digest rust)
export RUST ENGINE=$work/engine
say "the coordinator's image"
BASE=$(digest debian) deploy/images/build.sh coordinator localhost/duet-coordinator >/dev/null
say "the image of GPU nodes"
BASE=$(digest torch) deploy/images/build.sh gpu localhost/duet-gpu >/dev/null
pod images --format '{{.Repository}} {{.Size}}' | grep duet

# As a cluster runs them: nobody's user, a root that cannot be written, no capabilities.
# Podman's health checks are systemd's timers, which not every machine has.
strict=(--no-healthcheck --network host --read-only --read-only-tmpfs=false --tmpfs /tmp --tmpfs /dev/shm
    --cap-drop ALL --security-opt no-new-privileges --env OMP_NUM_THREADS=1)
data=$work/data
mkdir -p "$data"
chown 65532:65532 "$data"
cp configs/test.toml "$work/run.toml"
chmod 0644 "$work/run.toml"
mounts=(--volume "$data:/data" --volume "$work/run.toml:/etc/duet/run.toml:ro")
say "the base model, by the image itself"
pod run --rm "${strict[@]}" "${mounts[@]}" localhost/duet-gpu \
    duet-trainer bootstrap --seed 1 --profile test --out /data/base >"$work/bootstrap.log" 2>&1
port=$((20000 + $$ % 20000))
settings=(DUET__MODEL__PATH=/data/base DUET__DATA__PROMPTS=/data/base/miniworld/prompts-train.jsonl
    "DUET__COORDINATOR__LISTEN=127.0.0.1:$port" "DUET__RUN__ITERATIONS=${ITERATIONS:-3}")
env=()
for setting in "${settings[@]}"; do env+=(--env "$setting"); done
workers=(rollout-0 rollout-1 reward-0 trainer-0 trainer-1)
program() { case ${1%-*} in trainer) echo duet-trainer ;; *) echo "duet-${1%-*}-worker" ;; esac; }

say "a run, each process a container"
env+=(--env DUET__RUN__STORE=/data/run)
pod run --detach --name coordinator "${strict[@]}" "${mounts[@]}" "${env[@]}" localhost/duet-coordinator >/dev/null
for worker in "${workers[@]}"; do
    pod run --detach --name "$worker" "${strict[@]}" "${mounts[@]}" "${env[@]}" --env "DUET_RANK=${worker#*-}" \
        localhost/duet-gpu "$(program "$worker")" run --config /etc/duet/run.toml \
        --coordinator "http://127.0.0.1:$port" >/dev/null
done
[ "$(pod exec coordinator sh -c 'id -u; touch /root-is-writable 2>/dev/null || echo refused' | tr '\n' ' ')" = "65532 refused " ]
for name in coordinator "${workers[@]}"; do
    code=$(timeout 600 podman "${storage[@]}" wait "$name")
    [ "$code" = 0 ] || { echo "$name ended with $code" >&2; exit 1; }
done
pod logs coordinator 2>&1 | grep -q "the run is complete"
pod rm --all >/dev/null
pod run --rm "${strict[@]}" "${mounts[@]}" --entrypoint duet localhost/duet-coordinator audit /data/run

say "exit codes that a scheduler acts on"
expect() {
    local code=0
    pod run --rm "${strict[@]}" "${@:2}" >"$work/said" 2>&1 || code=$?
    [ "$code" = "$1" ] || { cat "$work/said"; echo "exit code $code, not $1" >&2; exit 1; }
}
expect 78 "${mounts[@]}" --env DUET__RUN__ITERATIONS=0 localhost/duet-coordinator
expect 64 "${mounts[@]}" localhost/duet-gpu duet-trainer run --config /etc/duet/run.toml --coordinator http://127.0.0.1:1

say "the same run as a Pod"
{
    cat <<END
apiVersion: v1
kind: Pod
metadata: {name: duet}
spec:
  hostNetwork: true
  restartPolicy: Never
  volumes:
    - {name: data, hostPath: {path: $data, type: Directory}}
    - {name: config, hostPath: {path: $work/run.toml, type: File}}
  containers:
END
    for name in coordinator "${workers[@]}"; do
        image=localhost/duet-gpu args="[$(program "$name"), run, --config=/etc/duet/run.toml, --coordinator=http://127.0.0.1:$port]"
        if [ "$name" = coordinator ]; then
            image=localhost/duet-coordinator args='[duet-coordinator, --config, /etc/duet/run.toml, --resume]'
        fi
        cat <<END
    - name: $name
      image: $image
      imagePullPolicy: Never
      command: [sh, /usr/local/bin/duet-node, run]
      args: $args
      securityContext: {runAsUser: 65532, runAsGroup: 65532, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: config, mountPath: /etc/duet/run.toml, readOnly: true}
      env:
        - {name: OMP_NUM_THREADS, value: "1"}
        - {name: TMPDIR, value: /data}
        - {name: JOB_COMPLETION_INDEX, value: "${name#*-}"}
        - {name: DUET__RUN__STORE, value: /data/pod}
END
        for setting in "${settings[@]}"; do
            echo "        - {name: ${setting%%=*}, value: \"${setting#*=}\"}"
        done
    done
} >"$work/pod.yaml"
sed -i '/name: coordinator/,/name: rollout-0/{/JOB_COMPLETION_INDEX/d}' "$work/pod.yaml"
pod kube play "$work/pod.yaml" >/dev/null
for name in coordinator "${workers[@]}"; do
    code=$(timeout 600 podman "${storage[@]}" wait "duet-$name")
    [ "$code" = 0 ] || { echo "duet-$name ended with $code" >&2; exit 1; }
done
# The same weights, whatever they were computed in.
last() { grep -o '"weights":"[0-9a-f]*"' "$data/$1/metrics.jsonl" | tail -n 1; }
[ -z "$(last run)" ] || [ "$(last run)" = "$(last pod)" ]
pod pod rm --all --force --time 1 >/dev/null
echo "deploy/images: built, run, audited, played as a Pod"
