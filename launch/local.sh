#!/usr/bin/env bash
# Run a config on all devices of this machine, again and again until it ends: after a kill or a
# crash the same command resumes. What Python itself reports (exit status 1) is not repeated.
#
#   launch/local.sh [-n N] CONFIG WORKDIR [--config.field=value ...]
#
# -n N starts N processes that run as one (see "Several machines" in the README), for CPUs; where one dies, all end and are
# started again. SIGTERM (and Ctrl-C) lets them save what they are at, and ends with status 143.
set -uo pipefail
usage() {
  echo "usage: $0 [-n N] CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
}
count=1
if [ "${1:-}" = -n ]; then
  count=${2:-}
  [[ $count =~ ^[1-9][0-9]*$ ]] || usage
  shift 2
fi
[ "$#" -ge 2 ] || usage
config=$1 workdir=$2
shift 2

stopped=
children=()
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

# A port that nobody listens on, below those that the system gives away.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  echo "$port"
}

# All processes, to their end. Returns the first status that is a mistake's (1), else the highest.
run() {
  local index status result=0 address=
  [ "$count" -eq 1 ] || address=127.0.0.1:$(free_port)
  children=()
  for ((index = 0; index < count; index++)); do
    "${PYTHON:-python}" -m dvinv.main --config "$config" --workdir "$workdir" \
      ${address:+--coordinator="$address" --num_processes="$count" --process_id="$index"} "$@" &
    children+=("$!")
  done
  [ -z "$stopped" ] || stop  # the signal was faster
  for child in "${children[@]}"; do
    wait_for "$child"
    status=$?
    if [ "$result" -ne 1 ] && { [ "$status" -eq 1 ] || [ "$status" -gt "$result" ]; }; then
      result=$status
    fi
  done
  children=()
  return "$result"
}

# Five times, not counting those that lived for ten minutes.
attempt=0
while :; do
  begin=$SECONDS
  run "$@"
  status=$?
  # Bash itself may be at a loss for a status where a signal came while it waited.
  [ -z "$stopped" ] || [ "$status" -le 1 ] || status=143
  if [ -n "$stopped" ] || [ "$status" -le 1 ] || [ "$status" -eq 130 ]; then
    exit "$status"
  fi
  [ $((SECONDS - begin)) -lt 600 ] || attempt=0
  attempt=$((attempt + 1))
  [ "$attempt" -lt 5 ] || exit "$status"
  echo "attempt $attempt ended with status $status; resuming" >&2
  sleep "${DELAY:-5}"
  [ -z "$stopped" ] || exit 143
done
