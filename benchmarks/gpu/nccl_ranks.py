"""One rank of the part `nccl`: NCCL's operations give the right values, launched and captured; rank 0 prints lines of
JSON with their times."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.on_device import OnDevice, WrongNumbers
from nettorrent_mpi import env

SIZES = {"4 KiB": 1 << 10, "1 MiB": 1 << 18, "64 MiB": 1 << 24}  # of float32
COUNT = 1000  # elements that are compared
REFUSED = "skipped: "


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.nccl_ranks")
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    env.prepare()
    if options.host:
        from tests.gpu.host.main import install

        install(0)
    from nettorrent_mpi.comm import nccl
    from nettorrent_mpi.comm.channels import NcclChannel
    from nettorrent_mpi.comm.placing import Connector
    from nettorrent_mpi.comm.world import World

    world = World()

    def tell(line: str) -> None:
        if world.rank == 0:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    bench = OnDevice()
    if world.size == 1:
        library = nccl.load()
        identity = bytes(library.get_unique_id())
        channel: Any = Alone(nccl.Communicator(library, world, identity, bench.device.runtime.address), bench)
        tell(json.dumps({"by": "nccl", "version": library.get_version(), "size": 1}))
    else:
        connector = Connector(world, bench.device)
        if connector.by != "nccl":
            version = nccl.load().get_version() if connector.by == "staged" else None
            tell(f"{REFUSED}{world.size} ranks on one GPU exchange {connector.by}; NCCL {version}")
            world.barrier()
            return 0
        channel = connector.connect([world])[world]
        assert isinstance(channel, NcclChannel)
        tell(json.dumps({"by": connector.by, "version": nccl.load().get_version(), "size": world.size}))
    for name in ("float32", "float64", "bfloat16"):
        tell(
            json.dumps({"case": f"values in {name}", "checked": checked(OnDevice(name, bench.device), channel, world)})
        )
    for label, size in SIZES.items():
        if options.host and size > 1 << 12:
            continue
        values = bench.up(np.zeros(size, np.float32))
        run = partial(channel.all_reduce, values)
        told: dict[str, Any] = {"case": f"all-reduce of {label}", "seconds_each": timed(bench, run, world)}
        if channel.capturable:
            told["seconds_captured"] = timed(bench, bench.captured(run), world)
        tell(json.dumps(told))
    bench.device.synchronize()
    world.barrier()
    return 0


class Alone:
    """NCCL's operations on one rank, where a channel launches nothing."""

    capturable = True

    def __init__(self, communicator: Any, bench: OnDevice):
        self._communicator, self._bench = communicator, bench

    @property
    def _stream(self) -> int:
        handle: int = self._bench.device.stream.handle  # type: ignore[attr-defined]
        return handle

    def all_reduce(self, values: Any) -> None:
        self._communicator.all_reduce(values, self._stream)

    def reduce_scatter(self, values: Any, part: Any) -> None:
        self._communicator.reduce_scatter(values, part, self._stream)

    def all_gather(self, part: Any, whole: Any) -> None:
        self._communicator.all_gather(part, whole, self._stream)

    def broadcast(self, values: Any, source: int) -> None:
        self._communicator.broadcast(values, source, self._stream)


def checked(bench: OnDevice, channel: Any, world: Any) -> list[str]:
    """Compare every operation, launched and captured, with what it should give. Small whole numbers are exact in all
    types. Raises WrongNumbers."""
    size, rank = world.size, world.rank
    numbers = [np.arange(COUNT * size) % 61 + member for member in range(size)]
    total, mine = sum(numbers), slice(rank * COUNT, (rank + 1) * COUNT)
    device, found = bench.device, []
    values, part = device.empty((COUNT * size,), bench.dtype), device.empty((COUNT,), bench.dtype)
    operations: dict[str, tuple[Callable[[], None], Any, Any]] = {
        "all_reduce": (lambda: channel.all_reduce(values), values, total),
        "reduce_scatter": (lambda: channel.reduce_scatter(values, part), part, total[mine]),
        "all_gather": (lambda: channel.all_gather(part, values), values, np.tile(np.arange(COUNT) % 7, size)),
        "broadcast": (lambda: channel.broadcast(values, size - 1), values, numbers[size - 1]),
    }
    if size > 1:
        before = (rank - 1) % size
        messages = [(values[:COUNT], (rank + 1) % size)], [(part, before)]
        operations["exchange"] = lambda: channel.exchange(*messages), part, numbers[before][:COUNT]
    for name, (run, result, wanted) in operations.items():
        for captured in (False, True) if channel.capturable else (False,):
            device.upload(values, numbers[rank].astype(bench.dtype))
            device.upload(part, (np.arange(COUNT) % 7).astype(bench.dtype))
            (bench.captured(run) if captured else run)()
            if not np.array_equal(bench.down(result), wanted):
                raise WrongNumbers(f"{name}{' captured' if captured else ''} on rank {rank} of {size}")
            found.append(f"{name}{' captured' if captured else ''}")
    return found


def timed(bench: OnDevice, run: Callable[[], None], world: Any) -> float:
    """Return the seconds of a run, of as many on all ranks."""
    if world.size == 1:
        return bench.seconds(run)
    run()
    world.barrier()
    return bench._timed(run, 20) / 20


if __name__ == "__main__":
    sys.exit(main())
