#!/usr/bin/env bash
# Submit several runs as one SLURM job array. `launch/sweep.sh --help` says how.
set -euo pipefail
# shellcheck disable=SC2034
me=launch/sweep.sh entry="" arguments=() words=() # set in common.sh

usage() {
    cat <<'USAGE'
launch/sweep.sh [SBATCH OPTIONS] FILE

Each line of FILE is a run, as launch/multinode.sh takes it, with a run directory of its own:

  configs/digits.yaml --optim.lr=1e-3 --run_dir=runs/lr1      # lines that are empty or begin with # do not count
  configs/digits.yaml --optim.lr=2e-3 --run_dir='runs/lr 2'   # words are quoted as in a shell, nothing is expanded

One job array of launch/multinode.sh is submitted, an element for each run, which is queued again by itself, alone,
when a signal stopped it. FILE is checked, and a copy of its runs kept in the working directory (sweep-*.txt), so that
it may be edited at once. The output of an element is in slurm-ARRAY_ELEMENT.out. The same command again goes on with
all of its runs. The options, the shape of each run, are sbatch's:

  LIMIT=4 launch/sweep.sh --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 --time=12:00:00 sweep.txt

Environment, beside that of launch/multinode.sh (--help), such as PYTHON, CONTAINER, PREFLIGHT=1:

  LIMIT=n                  elements that may run at the same time
  DRY_RUN=1                print the sbatch command and what each element would run, and stop
USAGE
}

# Refuse a run (its line's number in the file, its words) that cannot start, or shares its run_dir with another.
check_run() {
    local number=$1 i run_dir=""
    me="launch/sweep.sh: $file, line $number"
    choose_entry "${@:2}"
    [[ -f ${arguments[0]:-} ]] || die "there is no config file ${arguments[0]:-}"
    for ((i = 1; i < ${#arguments[@]}; i++)); do
        case ${arguments[i]} in
        --run_dir=* | --run-dir=*) run_dir=${arguments[i]#*=} ;;
        --run_dir | --run-dir) run_dir=${arguments[i + 1]:-} ;;
        esac
    done
    [[ -n $run_dir ]] || die "has no --run_dir=DIR: each run needs one of its own"
    run_dir=$(realpath -m -- "$run_dir")
    [[ -z ${line_of[$run_dir]:-} ]] || die "has the same run_dir as line ${line_of[$run_dir]}: $run_dir"
    line_of[$run_dir]=$number
    me=launch/sweep.sh
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$root/launch/common.sh"
help_first "$@"
file=${!#}
options=("${@:1:$#-1}")
[[ $file != -* ]] || die "the last argument is the FILE of runs, not $file"
[[ -f $file ]] || die "there is no $file"
for option in "${options[@]}"; do
    [[ $option != --array* && $option != -a* ]] || die "$option: the array is FILE's runs; LIMIT=n at the same time"
done
[[ ${LIMIT:-1} =~ ^[1-9][0-9]*$ ]] || die "LIMIT=$LIMIT is not a number of elements (1, 2, ...)"

declare -A line_of=() # run directory -> its line
runs=()
number=0
while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    me="launch/sweep.sh: $file, line $number"
    split_words "$line"
    ((${#words[@]})) || continue
    check_run "$number" "${words[@]}"
    runs+=("$line")
done <"$file"
me=launch/sweep.sh
((${#runs[@]})) || die "$file has no runs"

kept=$PWD/sweep-$(date +%Y%m%d-%H%M%S)-$$.txt
export DIT_ROOT=$root
command=(sbatch "--array=1-${#runs[@]}${LIMIT:+%$LIMIT}" --output=slurm-%A_%a.out
    "${options[@]}" "$root/launch/multinode.sh" "@$kept")
if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf '%q ' "${command[@]}"
    echo
    kept=$(mktemp)
fi
trap 'rm -f -- "$kept"' EXIT
printf '%s\n' "${runs[@]}" >"$kept"
if [[ ${DRY_RUN:-0} != 0 ]]; then
    for ((i = 1; i <= ${#runs[@]}; i++)); do
        would=$(SLURM_ARRAY_TASK_ID=$i "$root/launch/multinode.sh" "@$kept")
        echo "$i: ${would##*$'\n'}"
    done
    exit 0
fi
"${command[@]}"
trap - EXIT
echo "$me: ${#runs[@]} runs, one an element; their lines are kept in $kept" >&2
