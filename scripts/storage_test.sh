#!/usr/bin/env bash
# The tests of crates/store/tests/servers on two more servers: s3s-fs (installed with cargo into
# target/servers) and, where Debian's ceph packages are installed (`apt-get install ceph-mon ceph-osd
# ceph-mgr radosgw ceph-common`), a Ceph cluster of one machine in memory behind its RGW.
set -euo pipefail
cd "$(dirname "$0")/.."
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=testsecret
folder=$(mktemp -d)
processes=()
finish() {
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

answers() { # PORT: waits until something listens
  for _ in $(seq 600); do
    (exec 3<> "/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
    sleep 0.1
  done
  echo "nothing listens on port $1" >&2
  return 1
}

play() { # NAME PORT
  echo "== $1"
  DUET_TEST_S3=127.0.0.1:$2 cargo test --workspace --test servers any_other_server -- --nocapture
}

test -x target/servers/bin/s3s-fs ||
  cargo install --locked --root target/servers --features binary s3s-fs@0.14.1
mkdir -p "$folder/s3s/ckpt"
port=$(free_port)
target/servers/bin/s3s-fs --host 127.0.0.1 --port "$port" --access-key test \
  --secret-key testsecret "$folder/s3s" > "$folder/s3s.log" 2>&1 &
processes+=($!)
answers "$port"
play s3s-fs "$port"

if ! command -v radosgw > /dev/null; then
  echo "SKIPPED: Ceph is not installed" >&2
  [ -z "${CI:-}" ]
  exit
fi
ceph=$folder/ceph
mkdir -p "$ceph"/{mon,osd,mgr,run}
port=$(free_port)
id=$(python3 -c 'import uuid; print(uuid.uuid4())')
cat > "$ceph/ceph.conf" <<CONF
[global]
fsid = $id
mon_host = v1:127.0.0.1:$(free_port)
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_bind_msgr2 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
run_dir = $ceph/run
admin_socket = $ceph/run/\$name.asok
log_file = $ceph/run/\$name.log
[mon]
mon_data = $ceph/mon
[osd]
osd_data = $ceph/osd
osd_objectstore = memstore
[mgr]
mgr_data = $ceph/mgr
[client.rgw.r]
rgw_frontends = beast endpoint=127.0.0.1:$port
CONF
export CEPH_CONF=$ceph/ceph.conf
address=$(sed -n 's/^mon_host = //p' "$CEPH_CONF")
monmaptool --create --fsid "$id" --addv a "[$address]" "$ceph/monmap" > /dev/null
ceph-mon -c "$CEPH_CONF" --mkfs -i a --monmap "$ceph/monmap"
ceph-mon -c "$CEPH_CONF" -i a -f > /dev/null 2>&1 & processes+=($!)
timeout 60 ceph -c "$CEPH_CONF" mon stat > /dev/null
ceph-mgr -c "$CEPH_CONF" -i x -f > /dev/null 2>&1 & processes+=($!)
osd=$(python3 -c 'import uuid; print(uuid.uuid4())')
timeout 60 ceph -c "$CEPH_CONF" osd new "$osd" > /dev/null
ceph-osd -c "$CEPH_CONF" -i 0 --mkfs --osd-uuid "$osd"
ceph-osd -c "$CEPH_CONF" -i 0 -f > /dev/null 2>&1 & processes+=($!)
timeout 120 radosgw-admin -c "$CEPH_CONF" user create --uid=t --display-name=t --access-key=test \
  --secret-key=testsecret > /dev/null
radosgw -c "$CEPH_CONF" -n client.rgw.r -f > /dev/null 2>&1 & processes+=($!)
answers "$port"
# The bucket, by a signed request of the standard tool in the servers' environment.
scripts/servers.sh
.venv-servers/bin/python - "$port" <<'PYTHON'
import sys, boto3
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{sys.argv[1]}", region_name="us-east-1").create_bucket(Bucket="ckpt")
PYTHON
play "Ceph RGW" "$port"
