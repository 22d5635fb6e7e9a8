"""A configuration's training in PyTorch under DistributedDataParallel over gloo, one process per MPI rank, so that the
same launcher and the same network carry both sides of a comparison.

    benchmarks/hosts -n 4 -r 200mbit -- python -m benchmarks.ddp_slow configs/mnist_wide.yaml --steps 30

takes the options of nettorrent_mpi.speedup.torch_peer; rank 0 prints its line of JSON. Rank and size are those that
mpirun (Open MPI or MPICH) tells; the processes meet at MASTER_ADDR:MASTER_PORT (127.0.0.1:29500), and gloo takes the
interface that GLOO_SOCKET_IFNAME names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def placed(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of ranks) as the launcher tells them; (0, 1) without one."""
    for rank, size in LAUNCHERS:
        if rank in environ and size in environ:
            return int(environ[rank]), int(environ[size])
    return 0, 1


def main() -> None:
    from nettorrent_mpi.speedup.torch_peer import parse, train_one_of_many

    rank, size = placed(os.environ)
    options = parse([*sys.argv[1:], "--processes", str(size)])
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    train_one_of_many(rank, options, f"tcp://{host}:{port}")


if __name__ == "__main__":
    main()
