#!/usr/bin/env bash
# Run a config on all devices of this machine, again and again until it ends: after a kill or a
# crash the same command resumes. What Python itself reports (exit status 1) is not repeated.
#
#   launch/local.sh [-n N] CONFIG WORKDIR [--config.field=value ...]
#
# -n N starts N processes that run as one (see docs/devices_and_clusters.md), for CPUs; where one dies, all end and are
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

# A port that nobody listens on, below those that the system gives away.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  echo "$port"
}

# All processes, to their end. Returns the status of a mistake (1) if there is one, else the highest. Where one has died, the
# others end by themselves, or are ended a minute later: one may be waiting for it to start.
run() {
  local index child status deadline='' result=0 address=
  [ "$count" -eq 1 ] || address=127.0.0.1:$(free_port)
  children=()
  for ((index = 0; index < count; index++)); do
    "${PYTHON:-python}" -m dvinv.main --config "$config" --workdir "$workdir" \
      ${address:+--coordinator="$address" --num_processes="$count" --process_id="$index"} "$@" &
    children+=("$!")
  done
  [ -z "$stopped" ] || stop  # the signal was faster
  while [ "${#children[@]}" -gt 0 ]; do
    sleep 0.1
    for index in "${!children[@]}"; do
      child=${children[index]}
      if kill -0 "$child" 2>/dev/null; then
        [ -z "$deadline" ] || [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$child"
        continue
      fi
      wait "$child"
      status=$?
      unset "children[index]"
      [ "$status" -eq 0 ] || : "${deadline:=$((SECONDS + ${PATIENCE:-60}))}"
      if [ "$result" -ne 1 ] && { [ "$status" -eq 1 ] || [ "$status" -gt "$result" ]; }; then
        result=$status
      fi
    done
  done
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
