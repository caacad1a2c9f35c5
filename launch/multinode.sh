#!/usr/bin/env bash
# Start an experiment on a SLURM cluster, one task per rank. `launch/multinode.sh --help` says how.
# Defaults, which options on the sbatch command line override (the shape, 1 task on 1 node, is sbatch's own):
#SBATCH --job-name=dit
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -euo pipefail
# shellcheck disable=SC2034
me=launch/multinode.sh entry="" arguments=() words=() # set in common.sh

STOPPED=75 # exit status of a run that a signal stopped, saved, and that wants to go on

# shellcheck disable=SC2317 # called in common.sh
usage() {
    cat <<'USAGE'
sbatch [SBATCH OPTIONS] launch/multinode.sh CONFIG.yaml [--key.sub=value ...]
sbatch [SBATCH OPTIONS] launch/multinode.sh tools/encode.py IMAGES OUT [--flag=value ...]
sbatch [SBATCH OPTIONS] launch/multinode.sh tools/sample.py RUN --out=OUT [--flag=value ...]
sbatch --array=1-N [SBATCH OPTIONS] launch/multinode.sh @FILE

Starts tools/train.py, or the program that comes first (*.py, from the checkout), with the given arguments, one
SLURM task per rank (srun; no torchrun, no ssh). Submit it from the checkout; the checkout and the run directory
(or OUT) must be on a file system that all nodes share. The same command again resumes. So does the job itself: USR1
comes 180 s before the time limit (--signal=USR1@N: another time), the run saves at the next step, and the job queues
again; as it does when a node fails. TERM to the ranks (preemption) saves likewise. Each start looks first at its
nodes, network, data and disk, and names the node where something is missing. @FILE: an element of an array takes its
line of FILE for its arguments; launch/sweep.sh submits such arrays. Examples:

  sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --time=24:00:00 \
      launch/multinode.sh configs/imagenet256/b2_rectified_flow.yaml --run_dir=/shared/runs/a
  sbatch --nodes=2 --ntasks-per-node=2 launch/multinode.sh configs/digits.yaml --run_dir=runs/a   # on CPUs
  DRY_RUN=1 launch/multinode.sh configs/digits.yaml                                               # only look
  PREFLIGHT=1 sbatch --nodes=2 launch/multinode.sh configs/digits.yaml                            # only check
  CONTAINER=/shared/torch.sqsh CONTAINER_MOUNTS=/shared:/shared sbatch ... launch/multinode.sh ...

As many tasks as GPUs per node; --gpus-per-node rather than --gpus-per-task, so that the ranks of a node see
each other's GPUs. Inside salloc, `launch/multinode.sh CONFIG ...` starts in that allocation. Environment
(sbatch passes it on):

  DIT_ROOT=dir             the checkout; default the directory that sbatch was called in
  PYTHON=path              the interpreter; default .venv/bin/python of the checkout, else python3 (in a container:
                           the image's python3)
  DIT_ENTRY=file           the program to start instead of tools/train.py (absolute, or from the checkout)
  MASTER_PORT=n            rank 0's port; default 10000 + job id modulo 20000
  OMP_NUM_THREADS=n        threads per rank, at most the task's cores (which is the default)
  DIT_JOIN_SECONDS=n       ranks that have not come after so long are named, and the job fails; default 120
  CONTAINER=image          run in a container: a *.sif, a folder or a URI (docker://...) by `apptainer exec --nv`;
                           another file (*.sqsh) or an enroot name (nvcr.io#nvidia/pytorch:TAG) by pyxis
  CONTAINER_MOUNTS=a:b,... more folders, host:container; the checkout and the working directory are there anyhow
  PREFLIGHT=1              only check nodes, network, data and disk (tools/train.py --preflight); train nothing
  REQUEUE=0                do not queue again after a signal; the job ends with status 75
  DRY_RUN=1                print what would run, and stop
USAGE
}

# The tasks on the fullest node, from SLURM's "2(x3),1".
tasks_per_node() {
    local most=1 part
    IFS=, read -ra parts <<<"${SLURM_TASKS_PER_NODE:-1}"
    for part in "${parts[@]}"; do
        part=${part%%(*}
        ((part <= most)) || most=$part
    done
    echo "$most"
}

# Threads per rank: the cores of a task, or of the node shared out, and no more than the user asked for.
threads_per_task() {
    local cores=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / $1))}
    ((cores >= 1)) || cores=1
    if [[ ${OMP_NUM_THREADS:-} =~ ^[1-9][0-9]*$ ]] && ((OMP_NUM_THREADS < cores)); then
        cores=$OMP_NUM_THREADS
    fi
    echo "$cores"
}

# Under sbatch this file runs from a copy in a spool directory: its own path says nothing about the checkout.
find_root() {
    if [[ -n ${DIT_ROOT:-} ]]; then
        echo "$DIT_ROOT"
    elif [[ -f $(dirname "${BASH_SOURCE[0]}")/../dit/__init__.py ]]; then
        cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd
    else
        echo "${SLURM_SUBMIT_DIR:-$PWD}"
    fi
}

# This array element's line of a file, as `words`.
take_line() {
    local index=${SLURM_ARRAY_TASK_ID:-} line
    [[ -n $index ]] || die "@FILE is for job arrays: use launch/sweep.sh FILE, or sbatch --array=1-N"
    [[ -f $1 ]] || die "there is no $1"
    line=$(sed -n "${index}p" "$1")
    split_words "$line"
    ((${#words[@]})) || die "$1 has no run in line $index"
}

# Puts the command into CONTAINER: options of srun go to `options`, what comes before the interpreter to `inside`.
contain() {
    local mounts=$root:$root
    [[ $PWD == "$root" ]] || mounts+=,$PWD:$PWD
    [[ -z ${CONTAINER_MOUNTS:-} ]] || mounts+=,$CONTAINER_MOUNTS
    [[ ! -e $CONTAINER ]] || CONTAINER=$(realpath "$CONTAINER")
    if [[ $CONTAINER == *.sif || $CONTAINER == *://* || -d $CONTAINER ]]; then
        inside=(apptainer exec --nv "--bind=$mounts" "--pwd=$PWD" "$CONTAINER")
    else
        options+=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    fi
    inside+=(env) # also where the image sets them
    for name in OMP_NUM_THREADS MASTER_ADDR MASTER_PORT PYTHONPATH; do
        inside+=("$name=${!name}")
    done
}

dry_run=${DRY_RUN:-0}
root=$(find_root)
if [[ ! -f $root/dit/__init__.py ]]; then
    echo "$me: $root is not the checkout: submit from there, or set DIT_ROOT=/path/to/checkout" >&2
    exit 2
fi
root=$(cd "$root" && pwd)
# shellcheck source=/dev/null
source "$root/launch/common.sh"
help_first "$@"
if [[ $1 == @* ]]; then
    (($# == 1)) || die "nothing may follow $1: its lines say all"
    take_line "${1#@}"
    set -- "${words[@]}"
fi
choose_entry "$@"
[[ ${PREFLIGHT:-0} == 0 ]] || arguments+=(--preflight)
[[ -z ${CONTAINER:-} ]] || PYTHON=${PYTHON:-python3}
choose_python

tasks=$(tasks_per_node)
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    DIT_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol cannot expand $SLURM_JOB_NODELIST"
    MASTER_ADDR=${DIT_NODES%%$'\n'*}
    export DIT_NODES=${DIT_NODES//$'\n'/ } # for messages: from which of them no rank came
    OMP_NUM_THREADS=$(threads_per_task "$tasks")
    export OMP_NUM_THREADS MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
elif [[ $dry_run != 0 ]]; then
    MASTER_ADDR="<first node>" MASTER_PORT="<10000 + job id modulo 20000>" OMP_NUM_THREADS="<cores of a task>"
else
    die "no SLURM job here: use \`sbatch [OPTIONS] launch/multinode.sh CONFIG ...\` (--help), or launch/local.sh"
fi
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]] && ((SLURM_GPUS_ON_NODE > tasks)); then
    echo "$me: $SLURM_GPUS_ON_NODE GPUs but $tasks tasks on a node: the rest stay idle" \
        "(--ntasks-per-node=$SLURM_GPUS_ON_NODE uses all)" >&2
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the code that runs is this checkout's
# torchrun's variables, were any inherited, would be taken for this job's ranks.
unset RANK WORLD_SIZE LOCAL_RANK

# --export=ALL: also where sbatch ran with --export=NONE. --kill-on-bad-exit: one dead rank ends the step, else
# its peers wait for it. srun does not take --cpus-per-task over from sbatch by itself.
options=(--export=ALL --kill-on-bad-exit=1)
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
inside=()
[[ -z ${CONTAINER:-} ]] || contain
command=(srun "${options[@]}" "${inside[@]}" "$PYTHON" "$entry" "${arguments[@]}")

if [[ $dry_run != 0 ]]; then
    for name in MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONPATH; do
        printf '%s=%s\n' "$name" "${!name}"
    done
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
job=$SLURM_JOB_ID
# An array's number is also that of one of its elements: queueing that again would queue all of them.
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
echo "job $job (restart ${SLURM_RESTART_COUNT:-0}): ${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES} ranks on $SLURM_JOB_NODELIST," \
    "rendezvous $MASTER_ADDR:$MASTER_PORT, $OMP_NUM_THREADS threads each"
# TERM to this script itself: SLURM ends the job (cancelled, preempted), and decides whether it queues again.
terminated=0
trap 'terminated=1' TERM
status=0
"${command[@]}" || status=$?
if ((status == STOPPED && terminated == 0)) && [[ ${REQUEUE:-1} != 0 ]]; then
    echo "job $job was stopped by a signal and has saved: it queues again"
    scontrol requeue "$job" && sleep 60 # which ends this script
    echo "$me: job $job cannot be queued again; submit the same command to go on" >&2
fi
exit "$status"
