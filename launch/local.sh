#!/usr/bin/env bash
# Run a config on all devices of this machine, again and again until it ends: after a kill or a
# crash of the process the same command resumes. What Python itself reports (exit status 1) is not repeated.
#
#   launch/local.sh CONFIG WORKDIR [--config.field=value ...]
set -uo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
for attempt in 1 2 3 4 5; do
  "${PYTHON:-python}" -m dvinv.main --config "$config" --workdir "$workdir" "$@"
  status=$?
  if [ "$status" -le 1 ] || [ "$status" -eq 130 ]; then
    exit "$status"
  fi
  echo "attempt $attempt ended with status $status; resuming" >&2
  sleep "${DELAY:-5}"
done
exit "$status"
