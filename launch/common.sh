# shellcheck shell=bash disable=SC1003,SC2034,SC2154
# What the launch scripts share; they source it, with `me`, a script's name in messages, and `root`, the checkout, set.

die() {
    echo "$me: $*" >&2
    exit 2
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

# The words of a line, in `words`, with quotes, backslashes and comments as in a shell. Nothing is expanded; what a
# shell would have expanded ($, `) has to be quoted.
split_words() {
    local rest=$1 word="" is_open=0 is_quoted=0
    local space='^[[:space:]]+' single="^'([^']*)'" plain="^[^[:space:]'\"\\\$\`]+" escape='^\\(.)'
    local inside='^[^"\\$`]+' escape_inside='^\\(["\$`])' backslash='^\\' # between double quotes
    words=()
    while [[ -n $rest ]]; do
        if ((is_quoted)); then
            if [[ $rest == \"* ]]; then
                is_quoted=0 rest=${rest:1}
                continue
            elif [[ $rest =~ $escape_inside ]]; then
                word+=${BASH_REMATCH[1]}
            elif [[ $rest =~ $backslash || $rest =~ $inside ]]; then
                word+=${BASH_REMATCH[0]}
            else
                die "variables are not expanded: put single quotes around ${rest:0:20}"
            fi
        elif [[ $rest =~ $space ]]; then
            ((is_open == 0)) || words+=("$word")
            word="" is_open=0
        elif [[ $rest == \#* ]] && ((is_open == 0)); then
            break
        elif [[ $rest == \"* ]]; then
            is_quoted=1 is_open=1 rest=${rest:1}
            continue
        else
            if [[ $rest =~ $single || $rest =~ $escape ]]; then
                word+=${BASH_REMATCH[1]}
            elif [[ $rest =~ $plain ]]; then
                word+=${BASH_REMATCH[0]}
            else
                die "variables are not expanded, and quotes come in pairs: look at ${rest:0:20}"
            fi
            is_open=1
        fi
        rest=${rest:${#BASH_REMATCH[0]}}
    done
    ((is_quoted == 0)) || die "a double quote is not closed"
    ((is_open == 0)) || words+=("$word")
}
