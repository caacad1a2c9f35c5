#!/usr/bin/env bash
# Start an experiment on this machine: one rank per GPU, or NPROC ranks on the CPU.
set -euo pipefail
# shellcheck disable=SC2034
me=launch/local.sh entry="" arguments=() # set in common.sh

usage() {
    cat <<'USAGE'
launch/local.sh CONFIG.yaml [--key.sub=value ...]
launch/local.sh tools/encode.py IMAGES OUT [--flag=value ...]

Starts tools/train.py, or the program that comes first (*.py, from the checkout), with the given arguments under
torchrun: one rank per GPU, one rank where there is none. The same command again resumes. TERM and Ctrl-C go to the
ranks, which save; it ends when they have, with status 75 or 130 (a second Ctrl-C: at once). Environment:

  NPROC=n                  ranks, at most one a GPU; CPU ranks on a machine with GPUs: CUDA_VISIBLE_DEVICES= NPROC=2
  PYTHON=path              the interpreter; default .venv/bin/python of this checkout, else python3
  DIT_ENTRY=file           the program to start instead of tools/train.py (absolute, or from the checkout)
  OMP_NUM_THREADS=n        threads per rank, at most cores / ranks (which is the default)
  DRY_RUN=1                print what would run, and stop

Several machines: launch/multinode.sh.
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$root/launch/common.sh"
help_first "$@"
choose_entry "$@"
choose_python
command -v "$PYTHON" >/dev/null || die "$PYTHON does not run; \`make install\` builds .venv, or set PYTHON"

if [[ -z ${NPROC:-} ]]; then
    NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))') ||
        die "$PYTHON cannot import torch; \`make install\` builds .venv, or set PYTHON"
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a number of ranks (1, 2, ...)"

# nproc itself answers with OMP_NUM_THREADS where that is set.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=$((cores / NPROC > 0 ? cores / NPROC : 1))
if [[ ${OMP_NUM_THREADS:-} =~ ^[1-9][0-9]*$ ]] && ((OMP_NUM_THREADS < threads)); then
    threads=$OMP_NUM_THREADS
fi
export OMP_NUM_THREADS=$threads
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the code that runs is this checkout's

# ranks.py is torchrun without its own traceback of ranks that fail. --standalone: it finds a free port;
# --local-addr: also where this machine's name does not resolve.
command=("$PYTHON" "$root/launch/ranks.py" --standalone --local-addr=127.0.0.1
    --nnodes=1 "--nproc-per-node=$NPROC" "$entry" "${arguments[@]}")
if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf 'OMP_NUM_THREADS=%q PYTHONPATH=%q' "$OMP_NUM_THREADS" "$PYTHONPATH"
    printf ' %q' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
