"""Runs a command of nettorrent on the host device: `python -m tests.gpu.host.main [--seed N] train CONFIG ...`.

`device: gpu` then needs no GPU. Each rank has a device of its own, whose order of work depends on the seed and the
rank; with `--shared` all ranks' devices claim to be one GPU; with `--cupy` the host device lies below CuPy
(driver.py), whose arrays are used then. Under mpirun, as nettorrent_mpi itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import MutableMapping

from nettorrent_mpi import env

RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
MEMORY = 1 << 33  # bytes of a device; what is not used takes no room


def install(seed: int, *, shared: bool = False, cupy: bool = False) -> None:
    """Let this process, one rank, find the host device where it looks for a GPU, and NCCL's double for NCCL."""
    from nettorrent_mpi.comm import nccl
    from nettorrent_mpi.device import gpu, visible
    from nettorrent_mpi.device.gpu.runtime import Runtime
    from tests.gpu.host.nccl import HostNccl
    from tests.gpu.host.runtime import HostRuntime

    rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    uuid = "host device" if shared else f"host device {rank}"
    opened: list[HostRuntime] = []

    def look(environ: MutableMapping[str, str], number: int | None) -> visible.Visible:
        return visible.Visible((visible.VisibleGpu(uuid, "host device", MEMORY),))

    def open_runtime(index: int) -> Runtime:
        assert index == 0
        opened.append(HostRuntime(seed * 1000 + rank, memory=MEMORY, background=True, uuid=uuid))
        if cupy:
            from tests.gpu.host import driver

            driver.install(driver.Driver(opened[-1]))
            return gpu.open_cuda(index)
        return opened[-1]

    visible.look, gpu.open_runtime = look, open_runtime
    version = 22907 if shared else 23200  # the older one connects no ranks that share a GPU
    nccl.open_library = lambda: HostNccl(opened[-1].exchanges, version=version)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.host.main")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--cupy", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    env.prepare()
    install(options.seed, shared=options.shared, cupy=options.cupy)
    from nettorrent_mpi.__main__ import main as run

    return run(options.command)


if __name__ == "__main__":
    sys.exit(main())
