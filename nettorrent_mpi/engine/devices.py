"""The device of a run is chosen before anything else is made: `device: auto` is resolved, and every rank of a run on
GPUs has one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.cores import local_rank
from nettorrent_mpi.device import visible
from nettorrent_mpi.device.device import Device, make_device
from nettorrent_mpi.device.visible import Visible
from nettorrent_mpi.engine.run_plan import DeviceKind, Options
from nettorrent_mpi.plan.errors import DeviceError

Wanted = Literal["auto", "cpu", "gpu"]


class ChosenDevice(NamedTuple):
    """A ChosenDevice is what all ranks of a run compute on."""

    kind: DeviceKind
    line: str = ""  # says it to the user, where that is not what he wrote
    gpu: int = 0  # this rank's GPU, of those that it sees


def choose_device(world: World, wanted: Wanted) -> ChosenDevice:
    """Resolve `device` for all ranks, which agree: all compute on CPU cores, or each on a GPU. Raises DeviceError on
    all of them if GPUs are asked for and a rank can use none, or if only some ranks of an `auto` run can."""
    if wanted == "cpu":
        return ChosenDevice("cpu")
    own = visible.look(os.environ, local_rank(os.environ))
    found = world.gather_objects((world.host, local_rank(os.environ), own))
    seen = [each for _, _, each in found]
    with world.agreement():
        _check(wanted, seen, [host for host, _, _ in found])
    if not own.gpus:
        likely = [each for each in seen if each.likely]
        return ChosenDevice("cpu", f"cpu ({likely[0].missing})" if likely else "")
    chosen = visible.choose([(host, number, [gpu.uuid for gpu in each.gpus]) for host, number, each in found])
    taken = [each.gpus[index] for each, index in zip(seen, chosen, strict=True)]
    shared = Counter((host, gpu.uuid) for (host, _, _), gpu in zip(found, taken, strict=True))
    names = " and ".join(dict.fromkeys(gpu.name for gpu in taken))
    most = max(shared.values())
    ranks = f"; up to {most} ranks share one" if most > 1 else ", one for each rank" if world.size > 1 else ""
    return ChosenDevice("gpu", f"gpu ({names}{ranks})", chosen[world.rank])


def open_device(world: World, options: Options) -> Device:
    """Open what this rank computes on; on GPUs, all ranks of the world call. Raises DeviceError on all of them."""
    if options.device == "cpu":
        return make_device("cpu", options.kernels, bfloat16=options.bfloat16)
    return make_device("gpu", index=choose_device(world, "gpu").gpu, tf32=options.tf32)


def planned_device(wanted: Wanted) -> DeviceKind:
    """Resolve `device` for a plan: what the plan is for need not be here, but `auto` looks at this process."""
    if wanted != "auto":
        return wanted
    return "gpu" if visible.look(dict(os.environ), None).gpus else "cpu"


def _check(wanted: Wanted, seen: Sequence[Visible], hosts: Sequence[str]) -> None:
    lacking = [rank for rank, each in enumerate(seen) if not each.gpus]
    if not lacking or (wanted == "auto" and len(lacking) == len(seen)):
        return
    rank, size = lacking[0], len(seen)
    missing = seen[rank].missing
    alike = len(lacking) == size and all(each.missing == missing for each in seen)
    where = "" if alike else f" (rank {rank}, on {hosts[rank]})"
    if wanted == "gpu":
        error = DeviceError(f"a GPU is asked for, but {missing}{where}")
    else:
        error = DeviceError(
            f"auto finds a GPU on {size - len(lacking)} of {size} ranks, and all or none have to compute on one: "
            f"{missing}{where}; or write device: cpu"
        )
    error.key = "device"
    raise error
