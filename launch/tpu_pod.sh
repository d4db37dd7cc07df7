#!/usr/bin/env bash
# A config on a Cloud TPU slice of any number of hosts: one process a host, all of them one program on all chips.
#
#   NAME=dvinv ZONE=us-central2-b TYPE=v4-32 launch/tpu_pod.sh create
#   NAME=dvinv ZONE=us-central2-b launch/tpu_pod.sh setup
#   NAME=dvinv ZONE=us-central2-b launch/tpu_pod.sh run CONFIG WORKDIR [--config.field=value ...]
#   NAME=dvinv ZONE=us-central2-b launch/tpu_pod.sh delete
#
# WORKDIR must be a folder that all hosts see under one path: a Filestore (NFS) share, mounted by `setup` where NFS names
# it (NFS=10.0.0.2:/share, at /mnt/dvinv). A bucket will not do: it has no locks. Where a process dies, all end, and
# launch/local.sh on each host starts its own again.
# `run` holds an ssh connection to every host: start it in tmux, or on a machine that stays up. Where one breaks, the process
# there ends at the next line it prints, within seconds, or a while later if the host is slow to notice. End `run` then; the
# same command goes on from what was saved, and is refused for as long as a process of before is still running.
# VERSION is the TPU software (default tpu-ubuntu2204-base), CREATE further flags of gcloud, such as --spot.
set -euo pipefail
: "${NAME:?set NAME, the name of the TPU}" "${ZONE:?set ZONE, for instance us-central2-b}"
SOURCE=$(cd "$(dirname "$0")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)
there=("$NAME" "--zone=$ZONE")

usage() {
  echo "usage: NAME=... ZONE=... $0 create|setup|run CONFIG WORKDIR [--config.field=value ...]|delete" >&2
  exit 2
}

# A command on every host.
everywhere() {
  "${tpu[@]}" ssh "${there[@]}" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    : "${TYPE:?set TYPE, for instance v4-32}"
    # shellcheck disable=SC2086  # CREATE is a list of flags
    "${tpu[@]}" create "${there[@]}" "--accelerator-type=$TYPE" "--version=${VERSION:-tpu-ubuntu2204-base}" ${CREATE:-}
    ;;
  setup)
    everywhere 'mkdir -p dvinv'
    "${tpu[@]}" scp --recurse --worker=all "--zone=$ZONE" \
      "$SOURCE"/{dvinv,configs,launch,setup.py,pyproject.toml,README.md,LICENSE} "$NAME:dvinv/"
    if [ -n "${NFS:-}" ]; then
      everywhere "sudo apt-get install -qy nfs-common && sudo mkdir -p /mnt/dvinv && \
{ mountpoint -q /mnt/dvinv || sudo mount $(printf %q "$NFS") /mnt/dvinv; } && sudo chmod a+rwx /mnt/dvinv"
    fi
    # The machines' own Python may be older than dvinv takes.
    # shellcheck disable=SC2016  # expanded there
    everywhere 'python3 -m pip install -q --user uv &&
{ [ -x "$HOME/dvinv-env/bin/python" ] || "$HOME/.local/bin/uv" venv -q --seed --python 3.12 "$HOME/dvinv-env"; } &&
"$HOME/dvinv-env/bin/pip" install -q "$HOME/dvinv[tpu]"'
    ;;
  run)
    [ "$#" -ge 3 ] || usage
    shift
    # shellcheck disable=SC2016  # expanded there
    remote='export PYTHON=$HOME/dvinv-env/bin/python
cd "$HOME/dvinv" && bash launch/local.sh'
    everywhere "$remote$(printf ' %q' "$@" --distributed)"
    ;;
  delete)
    "${tpu[@]}" delete "${there[@]}" --quiet
    ;;
  *) usage ;;
esac
