#!/usr/bin/env bash
# hosts.sh 2,1,3 COMMAND [ARGUMENT ...]: runs a command over Open MPI on several hosts of one machine, here on three that
# have 2, 1 and 3 ranks.
#
# Each host is a network namespace with an address and a host name of its own: nt$id-0, nt$id-1, ..., joined by the links
# nv$id-0, ..., where id is this process's number modulo 100,000. Needs root, iproute2, and mpirun in PATH. All that it makes
# is removed at the end.
set -euo pipefail
IFS=, read -ra ranks <<<"$1"
shift
id=$(($$ % 100000)) net=10.$((64 + $$ % 60)).$(($$ / 60 % 250)) folder=$(mktemp -d) total=0
remove() {
  for i in "${!ranks[@]}"; do ip netns del "nt$id-$i" 2>/dev/null || true; done
  ip link del "ntb$id" 2>/dev/null || true
  rm -rf "$folder"
}
trap remove EXIT
ip link add "ntb$id" type bridge
ip link set "ntb$id" up
for i in "${!ranks[@]}"; do
  ip netns add "nt$id-$i"
  ip link add "nv$id-$i" type veth peer name eth0 netns "nt$id-$i"
  ip link set "nv$id-$i" master "ntb$id" up
  ip netns exec "nt$id-$i" sh -c "ip addr add $net.$((i + 1))/24 dev eth0; ip link set eth0 up; ip link set lo up"
  echo "$net.$((i + 1)) slots=${ranks[i]}" >>"$folder/hosts"
  total=$((total + ranks[i]))
done
cat >"$folder/agent" <<AGENT
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
i=\$((\${1##*.} - 1))
shift
code=0
ip netns exec "nt$id-\$i" unshare --uts bash -c "hostname host\$i; \$*" || code=\$?
# As ssh, whose host has vanished, it notices nothing.
if ((code == 128 + 9)); then while kill -0 "\$PPID"; do sleep 0.2; done; fi
exit "\$code"
AGENT
chmod +x "$folder/agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ip netns exec "nt$id-0" unshare --uts bash -c 'hostname host0; exec "$@"' bash \
  mpirun --hostfile "$folder/hosts" --prtemca plm_ssh_agent "$folder/agent" --prtemca prte_if_include "$net.0/24" \
  --mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include "$net.0/24" --mca mpi_yield_when_idle 1 \
  --map-by slot --bind-to none -n "$total" "$@"
