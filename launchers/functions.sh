# shellcheck shell=bash
# What the scripts have in common. They set `program`, their name, and then read this file.

# In the order of the array's indices; a job must find the same rate when it is requeued.
rates=(8x256 8x1024 16x1024 32x256 32x8192 64x64 64x256)

# shellcheck disable=SC2154 # program: see above
fail() {
  echo "$program: $*" >&2
  exit 2
}

# Read the settings, and refuse what could only fail later.
prepare() {
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "start me with sbatch"
  # shellcheck source=launchers/environment.sh
  source launchers/environment.sh
  command -v "$PERCOV2_PYTHON" >/dev/null || fail "PERCOV2_PYTHON=$PERCOV2_PYTHON is no program: set it in launchers/environment.sh"
  [[ -n $PERCOV2_DATA ]] || fail "PERCOV2_DATA is empty: set it in launchers/environment.sh"
}

# Set `rate`: that of an array's task, or empty.
choose_rate() {
  rate=
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || return 0
  rate=${rates[SLURM_ARRAY_TASK_ID]:-}
  [[ -n $rate ]] || fail "array index $SLURM_ARRAY_TASK_ID: there are the rates 0 to $((${#rates[@]} - 1)) (${rates[*]})"
}

# The first node is where the processes meet; jobs on the same node need ports of their own.
meet() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

# The plain id of an array's last task names the whole array.
this_job() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# SLURM's controller is at times too busy to answer.
insist() {
  local attempt
  for attempt in 1 2 3 4; do
    ! "$@" || return 0
    sleep "$attempt"
  done
  "$@"
}

requeue() {
  local restarts=${SLURM_RESTART_COUNT:-0}
  ((restarts < PERCOV2_MAX_RESTARTS)) || fail "stopped, not requeued after $restarts restarts: resubmit it, or raise PERCOV2_MAX_RESTARTS in launchers/environment.sh"
  echo "$program: requeueing job $(this_job)"
  insist scontrol requeue "$(this_job)"
}
