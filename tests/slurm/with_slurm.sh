#!/usr/bin/env bash
# with_slurm.sh COMMAND [ARGUMENT ...]: runs a command where a real Slurm of four nodes answers, all on this machine.
#
# The nodes n1 to n4 have four CPUs each, and share this machine's. There is no accounting database, so that sacct has
# nothing to say. The exit code is the command's.
#
# The daemons, their keys and their files live in namespaces (of processes, mounts and network) and in a folder of their
# own, so that a Slurm that this machine may belong to knows nothing of them, and nothing is left however this ends.
#
# Needs root, util-linux, iproute2, and Debian's slurm-wlm and munge: apt-get install --no-install-recommends slurm-wlm munge
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
nodes=4 cpus=4

if [[ -z ${NETTORRENT_SLURM_INSIDE:-} ]]; then
  (($#)) || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
  ((EUID == 0)) || { echo "with_slurm.sh: only root may start a Slurm" >&2; exit 2; }
  for tool in unshare setpriv ip munged slurmctld slurmd; do
    command -v "$tool" >/dev/null || {
      echo "with_slurm.sh: $tool is not here: apt-get install --no-install-recommends slurm-wlm munge util-linux iproute2" >&2
      exit 2
    }
  done
  folder=$(mktemp -d /tmp/nettorrent-slurm-XXXXXX)
  trap 'rm -rf "$folder"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # The first process of a namespace of processes takes all others along.
  NETTORRENT_SLURM_INSIDE=$folder setpriv --pdeathsig KILL \
    unshare --mount --net --pid --fork --kill-child --mount-proc bash "$0" "$@" </dev/null &
  status=0
  wait $! || status=$?
  exit $status
fi

D=$NETTORRENT_SLURM_INSIDE
unset NETTORRENT_SLURM_INSIDE
chmod 755 "$D"
mkdir "$D/state" "$D/munge"
# MPICH names its files there after the numbers of jobs and steps, which begin anew with every Slurm.
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
# Open MPI's daemons look for an interface that is not the loopback.
ip link add eth0 type veth peer name eth1
ip address add 10.77.1.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up

head -c 1024 /dev/urandom >"$D/munge/key"
chmod 400 "$D/munge/key"
munged --socket="$D/munge/socket" --key-file="$D/munge/key" --pid-file="$D/munge/pid" --log-file="$D/munge/log" \
  --seed-file="$D/munge/seed"

cat >"$D/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=1
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmdSpoolDir=$D/spool-%n
StateSaveLocation=$D/state
SlurmdParameters=config_overrides
SwitchType=switch/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd-%n.log
KillWait=5
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-$((17000 + nodes))] CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
export SLURM_CONF=$D/slurm.conf
slurmctld
for ((i = 1; i <= nodes; i++)); do
  mkdir "$D/spool-n$i"
  slurmd -N "n$i"
done
for ((i = 0; i < 300; i++)); do
  [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "$nodes" ]] && break
  sleep 0.1
done
[[ $(sinfo -h -t idle -o %D) == "$nodes" ]] || { tail -n 20 "$D"/*.log >&2; exit 2; }

export NETTORRENT_TEST_SLURM=$nodes # for tests: submit jobs here
status=0
"$@" || status=$?
exit $status
