# shellcheck shell=bash
# Runs the stages of a set-up: each once, one line on the screen, everything else in a log.
#
# A stage is a shell function. After success its stamp holds a hash of what went in: the function's
# own text, its inputs, and the hash of the stage before it. A later call whose hash is the same
# skips it; an interrupted stage has no stamp and runs again.
#
# The caller sets state (the folder of stamps and log) before sourcing this, and total (how many
# stages there will be) after.

: "${state:?the folder of stamps and log}"
total=0
previous_hash=''
stage_number=0
readonly needs_user=3 # exit status of a stage that has said in one line what the user must do

# Ends the program with one line.
die() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

# Inside a stage: ends it with the one line that says what the user must do.
ask_user() {
    printf '%s\n' "$*" >"$state/advice"
    exit "$needs_user"
}

# Only one set-up at a time. The lock is inherited by pip and colcon, so that when this program is
# killed and started again it waits for what it left behind.
lock() {
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock --nonblock 9 && return
    echo 'set-up: another one is still running here; waiting for it'
    flock 9
}

# hash_inputs INPUT...: contents of files, everything below folders, or the text itself.
hash_inputs() {
    local input
    for input in "$@"; do
        if [ -d "$input" ]; then
            find "$input" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 -r sha256sum
        elif [ -f "$input" ]; then
            sha256sum <"$input"
        else
            echo "$input"
        fi
    done | sha256sum | cut -d ' ' -f 1
}

# What is going on, for a person who waits: seconds, and the last line of the log.
show_progress() {
    local pid=$1 title=$2 start=$3 width last
    while sleep 1 && kill -0 "$pid" 2>/dev/null; do
        last=$(tail -c 400 "$state/setup.log" | tr '\r' '\n' | sed 's/^ *//' | grep -v '^$' | tail -n 1)
        if [ -t 1 ]; then
            width=$(($(tput cols 2>/dev/null || echo 80) - 1))
            printf '\r\033[K%.*s' "$width" "$title ... $((SECONDS - start)) s  $last"
        elif (((SECONDS - start) % 30 == 0)); then
            printf '%s ... %d s  %.60s\n' "$title" "$((SECONDS - start))" "$last"
        fi
    done
}

# stage NAME DESCRIPTION INPUT...: runs the function stage_NAME unless its stamp is current.
stage() {
    local name=$1 title start status=0 hash pid
    stage_number=$((stage_number + 1))
    title="[$stage_number/$total] $2"
    hash=$(hash_inputs "$previous_hash" "$(declare -f "stage_$name")" "${@:3}")
    previous_hash=$hash
    [ "$(cat "$state/$name.stamp" 2>/dev/null)" != "$hash" ] || return 0

    rm -f "$state/$name.stamp" "$state/advice"
    start=$SECONDS
    printf '=== %s  %s\n' "$(date --iso-8601=seconds)" "$title" >>"$state/setup.log"
    set -m # a process group of its own, so that an interruption reaches pip and the compiler
    (
        set -e
        "stage_$name"
    ) </dev/null >>"$state/setup.log" 2>&1 &
    pid=$!
    set +m
    # shellcheck disable=SC2064 # this pid, now
    trap "kill -- -$pid 2>/dev/null; exit 130" INT TERM
    show_progress "$pid" "$title" "$start"
    wait "$pid" || status=$?
    trap - INT TERM
    [ ! -t 1 ] || printf '\r\033[K'

    if [ "$status" -ne 0 ]; then
        if [ "$status" -ne "$needs_user" ]; then
            tail -n 12 "$state/setup.log" | cut -c 1-160 >&2
            die "$title failed after $((SECONDS - start)) s; the whole log is $state/setup.log; run the same command again to resume"
        fi
        die "$(cat "$state/advice")"
    fi
    echo "$hash" >"$state/$name.stamp.new"
    mv "$state/$name.stamp.new" "$state/$name.stamp"
    printf '%s: done, %d s\n' "$title" "$((SECONDS - start))"
}
