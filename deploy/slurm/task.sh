#!/usr/bin/env bash
# One worker of a Slurm step: task.sh rollout|reward|trainer. It calls itself ROLE-$SLURM_PROCID. Started again after a failure that may
# pass; 0 (the run is over or it was drained), 64 and 78 (wrong configuration) end it.
set -uo pipefail

: "${CONFIG:?}" "${COORDINATOR:?}" "${SLURM_PROCID:?}"
case ${1:-} in
rollout) program=duet-rollout-worker ;;
reward) program=duet-reward-worker ;;
trainer) program=duet-trainer ;;
*)
    echo "usage: $0 rollout|reward|trainer" >&2
    exit 64
    ;;
esac

stopping='' child=''
trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
for try in $(seq "${MAX_TRIES:-20}"); do
    "$program" run --config "$CONFIG" --coordinator "$COORDINATOR" &
    child=$!
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    case $code in 0 | 64 | 78) break ;; esac
    [ -z "$stopping" ] || break
    echo "$1-$SLURM_PROCID ended with $code (try $try)" >&2
    sleep "${RETRY_SECONDS:-10}"
done
exit "$code"
