# shellcheck shell=bash disable=SC1003,SC2034,SC2154
# What the launch scripts share; they source it, with `me`, a script's name in messages, and `root`, the checkout, set.

die() {
    echo "$me: $*" >&2
    exit 2
}

# Print the script's usage and end, where that is asked for, or where nothing is.
help_first() {
    case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    "")
        usage >&2
        exit 2
        ;;
    esac
}

# The program to start, in `entry`: the first argument if it is a *.py, else DIT_ENTRY, else tools/train.py; the
# other arguments, in `arguments`.
choose_entry() {
    arguments=("$@")
    entry=${DIT_ENTRY:-tools/train.py}
    if [[ -z ${DIT_ENTRY:-} && $1 == *.py ]]; then
        entry=$1
        arguments=("${@:2}")
    fi
    [[ $entry == /* ]] || entry=$root/$entry
    [[ -f $entry ]] || die "there is no $entry; the first argument or DIT_ENTRY names the program to start"
}

choose_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=$root/.venv/bin/python
        [[ -x $PYTHON ]] || PYTHON=python3
    fi
}

# The words of a line, in `words`, with quotes, backslashes and comments as in a shell. Nothing is expanded.
split_words() {
    local line=${1%%[[:space:]]#*} found
    [[ $line != \#* ]] || line=""
    [[ $line != *[\$\`]* ]] || die "variables are not expanded: write their values"
    found=$(xargs -r printf '%s\n' <<<"$line" 2>/dev/null) || die "quotes come in pairs: look at $line"
    words=()
    [[ -z $found ]] || mapfile -t words <<<"$found"
}
