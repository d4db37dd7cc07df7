#!/usr/bin/env bash
# Run a config on all devices of this machine, again and again until it ends: after a kill or a
# crash of the process the same command resumes. What Python itself reports (exit status 1) is not repeated.
#
#   launch/local.sh [-n N] CONFIG WORKDIR [--config.field=value ...]
#
# -n N starts N processes that share the batches of one work directory, each brought back for itself; the first mistake
# ends all of them. With bn_stats='global' they meet at a free port (or at DVINV_COORDINATOR, host:port), and where one dies
# all end within half a minute and are brought back.
# SIGTERM (and Ctrl-C) lets them save what they are at, and ends with status 143.
set -uo pipefail
usage() {
  echo "usage: $0 [-n N] CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
}
count=
if [ "${1:-}" = -n ]; then
  count=${2:-}
  [[ $count =~ ^[1-9][0-9]*$ ]] || usage
  shift 2
fi
[ "$#" -ge 2 ] || usage
config=$1 workdir=$2
shift 2

stopped=
children=() shells=()
# shellcheck disable=SC2329  # the trap calls it
stop() {
  stopped=1
  # "${children[@]-}" of an empty list is one empty word.
  for child in "${children[@]-}"; do
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
  done
}
trap stop TERM INT

# Wait for a child to its end: bash returns from wait when a signal comes.
wait_for() {
  local status
  while :; do
    wait "$1"
    status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# One process, again and again; five times, not counting those that lived for ten minutes.
run() {
  local attempt=0 begin status
  while :; do
    begin=$SECONDS
    "${PYTHON:-python}" -m dvinv.main --config "$config" --workdir "$workdir" "$@" &
    children=("$!")
    [ -z "$stopped" ] || stop  # the signal was faster
    wait_for "$!"
    status=$?
    children=()
    # Bash itself may be at a loss for a status where a signal came while it waited.
    [ -z "$stopped" ] || [ "$status" -le 1 ] || status=143
    if [ -n "$stopped" ] || [ "$status" -le 1 ] || [ "$status" -eq 130 ]; then
      return "$status"
    fi
    [ $((SECONDS - begin)) -lt 600 ] || attempt=0
    attempt=$((attempt + 1))
    [ "$attempt" -lt 5 ] || return "$status"
    echo "attempt $attempt ended with status $status; resuming" >&2
    sleep "${DELAY:-5}"
    [ -z "$stopped" ] || return 143
  done
}

if [ -z "$count" ]; then
  run "$@"
  exit
fi

# Where the processes of a job find each other: a port that nobody listens on, below those that the system gives away.
if [ -z "${DVINV_COORDINATOR:-}" ]; then
  port=$((20000 + RANDOM % 12000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  export DVINV_COORDINATOR=127.0.0.1:$port
fi

# Several: each is a shell of its own that runs one process, and ends all where it gives up ($$ is the first shell).
statuses=$(mktemp) || exit
for ((index = 0; index < count; index++)); do
  (
    children=()
    trap stop TERM INT  # a subshell begins without
    export DVINV_PROCESS=$index DVINV_PROCESSES=$count
    run "$@"
    status=$?
    trap '' TERM INT
    echo "$status" >>"$statuses"
    [ "$status" -eq 0 ] || [ -n "$stopped" ] || kill -TERM $$
  ) &
  shells+=("$!")
done
children=("${shells[@]}")
[ -z "$stopped" ] || stop
for shell in "${shells[@]}"; do
  wait_for "$shell"
done
# A mistake says more than that the others were asked to end.
result=$(sort -n "$statuses" | grep -vx -e 0 -e 143 | head -n 1)
: "${result:=$(sort -n "$statuses" | tail -n 1)}"
rm -f "$statuses"
exit "$result"
