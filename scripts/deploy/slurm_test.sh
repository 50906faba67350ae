#!/usr/bin/env bash
# Runs deploy/slurm on a Slurm cluster of five nodes on this machine: slurm_test.sh FOLDER_WITH_BINARIES
# (Slurm starts each component of a heterogeneous job on nodes of its own.) The run of configs/test.toml is told in its middle that its time is up; it must checkpoint, go back into
# the queue, and go on to its end. Needs root and Debian's slurm-wlm and munge.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -eq 1 ] || { echo "usage: $0 FOLDER_WITH_BINARIES" >&2; exit 64; }
for program in munged slurmctld slurmd sbatch; do
    if ! PATH=$PATH:/usr/sbin command -v "$program" >/dev/null; then
        echo "$program is missing: apt-get install --no-install-recommends slurm-wlm munge" >&2
        exit 69
    fi
done
[ "$(id -u)" = 0 ] || { echo "several slurmd on one machine need root" >&2; exit 77; }
export PATH=$PATH:/usr/sbin
BIN=$(cd "$1" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/duet-slurm.XXXXXX")
pids=()
end() {
    code=$?
    set +e
    [ -z "${job:-}" ] || scancel "$job" 2>/dev/null
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
    [ "$code" = 0 ] || tail -n 40 "$work"/log/*.log "$work"/*.out 2>/dev/null
    wait
    rm -rf "$work"
    exit "$code"
}
trap end EXIT

# Waits for a command to succeed: within SECONDS what command...
within() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        if [ $SECONDS -ge "$until" ]; then echo "waited in vain for $what" >&2; return 1; fi
        sleep 1
    done
}

mkdir -p "$work"/{log,state,spool,munge}
chmod 0711 "$work" "$work/munge"
dd if=/dev/urandom of="$work/key" bs=1024 count=1 status=none
chmod 0400 "$work/key"
munged --foreground --force --key-file="$work/key" --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --seed-file="$work/munge/seed" >"$work/log/munged.log" 2>&1 &
pids+=($!)
here=$(hostname)
cat >"$work/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$here(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort=26817
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmdSpoolDir=$work/spool/%n
StateSaveLocation=$work/state
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=5
NodeName=n[1-5] NodeHostname=$here NodeAddr=127.0.0.1 Port=[27001-27005] CPUs=4 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=gpu Nodes=n[1-5] Default=YES MaxTime=INFINITE State=UP
EOF
# Any character device counts as a GPU for Slurm's bookkeeping.
for i in 0 1 2 3; do mknod "$work/gpu$i" c 1 3 2>/dev/null || true; done
echo "NodeName=n[1-5] Name=gpu File=$work/gpu[0-3]" >"$work/gres.conf"
export SLURM_CONF=$work/slurm.conf
within 20 munge test -S "$work/munge/socket"
slurmctld -D >"$work/log/ctld-out.log" 2>&1 &
pids+=($!)
for node in n1 n2 n3 n4 n5; do
    slurmd -D -N "$node" >"$work/log/$node-out.log" 2>&1 &
    pids+=($!)
done
idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 5 ]; }
within 60 "five nodes" idle

# The script as it is, with fewer tasks, no wish for memory, and one processor a task.
sed -E -e 's/--ntasks=40/--ntasks=2/; s/--ntasks=4 /--ntasks=1 /; s/--ntasks=16/--ntasks=2/' \
    -e 's/ --mem(-per-cpu)?=[0-9]+G//; s/--cpus-per-task=[0-9]+/--cpus-per-task=1/' \
    deploy/slurm/duet.sbatch >"$work/job.sbatch"
"$BIN/duet-trainer" bootstrap --seed 1 --profile test --out "$work/base" >"$work/log/bootstrap.log" 2>&1
export CONFIG=$PWD/configs/test.toml STORE=$work/run TASK=$PWD/deploy/slurm/task.sh TRUSTED_NETWORK=yes BIN
export DUET__MODEL__PATH=$work/base DUET__DATA__PROMPTS=$work/base/miniworld/prompts-train.jsonl
export DUET__RUN__ITERATIONS=${ITERATIONS:-12} COORDINATOR_HOST=127.0.0.1
job=$(cd "$work" && sbatch --parsable job.sbatch)
job=${job%%;*}
echo "job $job"
field() { scontrol show job "$job" 2>/dev/null | sed -n "s/.*\b$1=\([A-Z0-9]*\).*/\1/p" | head -n 1; }
committed() { [ -f "$STORE/metrics.jsonl" ] && [ "$(wc -l <"$STORE/metrics.jsonl")" -ge "$1" ]; }
within 240 "the second iteration" committed 2
scancel --batch --signal=USR1 "$job"
requeued() { [ "$(field Restarts)" = 1 ]; }
within 120 "a requeued job" requeued
before=$(wc -l <"$STORE/metrics.jsonl")
[ "$before" -lt "$DUET__RUN__ITERATIONS" ] || { echo "the run was over before its time was up" >&2; exit 1; }
[ -n "$(ls "$STORE/checkpoints")" ] || { echo "no checkpoint was written" >&2; exit 1; }
echo "requeued after $before of $DUET__RUN__ITERATIONS iterations"
# Slurm would wait two minutes.
hasten() { scontrol update jobid="$job" eligibletime=now 2>/dev/null || true; [ "$(field JobState)" = RUNNING ]; }
within 180 "the job's second start" hasten
completed() { [ "$(field JobState)" = COMPLETED ]; }
within 300 "the end of the run" completed
committed "$DUET__RUN__ITERATIONS"
grep -h "the run is complete" "$work"/*.out
echo "deploy/slurm: checkpointed, requeued, completed"
