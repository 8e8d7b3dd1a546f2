# --- what every job does (slurm/job.sh) -------------------------------------------------------------------------------

say() { echo "$(date '+%F %T') $*"; }
mistake() { # nothing that another attempt would mend
    echo "error: $*" >&2
    exit 2
}
JOB=$SLURM_JOB_ID # which of one task of an array may be that of all
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
job_says() { scontrol show job "$JOB" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
can_be_written() { # a full quota shows only when one writes
    local probe=$1/.room_$SLURM_JOB_ID code
    mkdir -p "$1" && head -c 1000000 /dev/zero >"$probe"
    code=$?
    rm -f "$probe"
    return $code
} 2>/dev/null

cd "$WORK_DIR" || mistake "$WORK_DIR cannot be entered on $(hostname); submit from a folder that all nodes see."
command -v scontrol >/dev/null ||
    mistake "there is no scontrol on $(hostname), which requeues the job; submit from outside of any container."
[ -x "$HOST_PYTHON" ] || HOST_PYTHON=python3
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
can_be_written "$JOB_FOLDER" || mistake "$JOB_FOLDER cannot be written on $(hostname): is its disk or your quota full?"
if [ "${PREFLIGHT:-no}" = yes ]; then # it looks at every node, and a job stays away from those that are full
    mkdir -p "$SCRATCH"
else
    can_be_written "$SCRATCH"
fi || mistake "$SCRATCH cannot be written on $(hostname): is it the right SCRATCH in env.sh, and is there room?"
# Compiled kernels: a home folder would be slow, and shared by all nodes at once.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton-$(id -un)}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor-$(id -un)}

# Before the limit and before a preemption the job gets USR2. SLURM sends TERM to all that it is about to end, steps
# included: then there is nothing to pass on.
STEP='' STEP_SIGNAL=USR2 IS_STOPPING=no SIGNALS=0
# shellcheck disable=SC2317 # traps call it
on_signal() {
    if [ "$1" = TERM ] && is_out_of_time; then # there is no waiting for the step: this script is killed with it
        say "TERM: out of time before all was saved"
        end_attempt 1
    fi
    say "$1: the job is to end; waiting for it to save"
    IS_STOPPING=yes SIGNALS=$((SIGNALS + 1))
    [ "$1" = TERM ] || [ -z "$STEP" ] || stop_step
}
is_out_of_time() { [ "$SECONDS" -ge "$((TIME_S - 10))" ]; }
trap 'on_signal USR2' USR2
trap 'on_signal TERM' TERM

begin_attempt() { # counts it, and makes the folder for its logs
    NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)
    ATTEMPT=$("$HOST_PYTHON" -m slurm.attempts begin "$JOB_FOLDER" --nodes "$NODES" "$@") || exit
    export ATTEMPT_LOGS=$JOB_FOLDER/logs/attempt_$ATTEMPT
    say "attempt $ATTEMPT on $NODES; logs are in $ATTEMPT_LOGS"
}

run_step() { # srun in the background, or bash would answer no signal before it ends
    local seen code
    [ "$IS_STOPPING" = no ] || return 75 # a signal came before there was a step to pass it on to
    "${SRUN[@]}" "$@" >>"$ATTEMPT_LOGS/launcher.log" 2>&1 &
    STEP=$!
    [ "$IS_STOPPING" = no ] || stop_step # it came between these lines
    while :; do # a signal interrupts `wait`
        seen=$SIGNALS
        wait "$STEP"
        code=$?
        [ "$seen" = "$SIGNALS" ] && break
    done
    STEP=''
    [ "$IS_STOPPING" = no ] || has_begun || code=75 # nothing was lost
    return $code
}

stop_step() { # before there are ranks, their signal would end a launcher or be lost on its way: srun answers TERM
    local how=$STEP_SIGNAL
    has_begun || how=TERM
    kill -s "$how" "$STEP" 2>/dev/null
}

has_begun() { compgen -G "$ATTEMPT_LOGS/rank_*.json" >/dev/null; }

end_attempt() { # with the step's exit code: this job again, or none, or the next one
    local verdict code # after the code perhaps nodes to stay away from, and the cause where the script knows it
    verdict=$("$HOST_PYTHON" -m slurm.attempts end "$JOB_FOLDER" --exit-code "$1" --cause "${3:-}")
    code=$?
    say "attempt $ATTEMPT is over, with exit code $1 of its launcher: $verdict"
    [ "$verdict" != requeue ] || requeue "${2:-}"
    [ "$verdict" = requeue ] || [ -z "${CHAIN_DIR:-}" ] || write_report
    exit $code
}

write_report() { # on the chain, with what this job has come to
    local left=$((TIME_S - SECONDS - 30)) # a job that is done is not to be ended by its limit now
    [ "$left" -gt 0 ] || return 0
    trap '' TERM USR2
    timeout "$((left < 300 ? left : 300))" "${SRUN[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="${NODES%% *}" \
        "${PYTHON[@]}" -m slurm.report "$CHAIN_DIR" ||
        say "the chain's page is not written; python -m slurm.report $CHAIN_DIR writes it"
}

requeue() { # which ends this script: SLURM sends TERM, and gives it some seconds for what is left to do
    local exclude
    trap '' TERM
    # A job that SLURM is ending already was cancelled, or is requeued without us; or saving took longer than there was.
    if [ "$(job_says JobState)" != RUNNING ] && ! is_out_of_time; then
        say "SLURM has ended the job; whether it goes on is not for the job to say"
        return
    fi
    scontrol requeue "$JOB" || { say "SLURM does not requeue this job; submit it again with slurm.resubmit"; return; }
    if [ -n "$1" ]; then
        exclude=$(job_says ExcNodeList)
        exclude=${exclude#"(null)"}
        scontrol update JobId="$JOB" ExcNodeList="${exclude:+$exclude,}$1"
    fi
    # SLURM would let it wait for two minutes, lest a node take it for the job that it has just ended. Nodes tell the two
    # by the time, and their clocks differ by less than this.
    scontrol update JobId="$JOB" StartTime=now+10
}
