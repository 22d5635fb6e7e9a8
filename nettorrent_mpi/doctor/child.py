"""The process that makes the checks of a rank, and tells its supervisor in lines of JSON which it begins and what it
finds: `python -m nettorrent_mpi.doctor.child DESCRIPTOR`, with a Task on standard input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from nettorrent_mpi import env

START, ROLL, MESSAGES, TRAINING = "MPI", "ranks", "messages", "training"
# What is checked before MPI starts: by each rank, or by the first rank of each node. All names, in the report's order.
EACH = ("libraries", "limits", "cores", "GPU", "output")
FIRST = ("launcher", "BLAS", "kernels", "/dev/shm", "/tmp", "HDF5")
NAMES = (
    "libraries", "launcher", START, ROLL, "limits", "cores", "pinning", "installation", "BLAS", "kernels", "GPU",
    "/dev/shm", "/tmp", "output", "HDF5", MESSAGES, "clocks", TRAINING,
)  # fmt: skip
TOGETHER = (START, ROLL, MESSAGES, TRAINING)


def names_of(first: bool) -> list[str]:
    """Return the names of a rank's own checks, in their order."""
    return [name for name in NAMES if name in EACH or (first and name in FIRST)]


def main() -> None:
    """Make the checks that are left."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as line:
        task = json.loads(sys.stdin.readline())
        env.prepare()
        from nettorrent_mpi.doctor.finding import Finding
        from nettorrent_mpi.doctor.surroundings import Surroundings

        task["place"][0] = Path(task["place"][0])
        findings = [Finding(*each) for each in task["findings"]]
        _Checks(Surroundings(*task["place"]), findings, line).run(task["done"])


class _Checks:
    def __init__(self, place: Any, findings: list[Any], line: TextIO):
        self._place, self._findings, self._line = place, findings, line
        self._met = False  # whether the ranks have met

    def run(self, done: list[str]) -> None:
        for name in names_of(self._place.first):
            if name not in done:
                self._begin(name)
                for each in _look(name)(self._place):
                    self._tell(each, name)
        if self._place.launched or not {START, TRAINING} <= set(done):
            self._together(done)
        self._say(end=True, met=self._met)

    def _together(self, done: list[str]) -> None:
        from nettorrent_mpi.comm.launcher import flush
        from nettorrent_mpi.doctor import together
        from nettorrent_mpi.doctor.finding import fault
        from nettorrent_mpi.plan.errors import NetTorrentError

        self._begin(START)
        try:
            world, found = together.start(self._place)
        except NetTorrentError as error:
            reason, _, remedy = str(error).partition(": ")
            self._tell(fault(reason, remedy or "see `launcher`"), START)
            return
        self._tell(found, START)
        self._begin(ROLL)
        everyone = together.roll_call(world, self._findings)
        self._met = True
        if world.rank == 0:
            self._say(everyone=[(each.host, each.findings) for each in everyone])
            for name, each in together.compare(world, everyone):
                self._tell(each, name)
        if MESSAGES not in done:
            self._measure(world, everyone)
        if TRAINING not in done:
            self._begin(TRAINING)
            found = together.train(world)
            if world.rank == 0:
                self._tell(found, TRAINING)
        world.free()
        flush()

    def _measure(self, world: Any, everyone: Any) -> None:
        from nettorrent_mpi.doctor import together

        self._begin(MESSAGES)
        crowded = any(each.check == "cores" and each.state != "ok" for told in everyone for each in told.findings)
        for name, each in [
            *together.measure(world, everyone, crowded),
            *together.look_for_file(world, self._place, everyone),
        ]:
            self._tell(each, name)

    def _begin(self, name: str) -> None:
        self._say(begin=name)

    def _tell(self, finding: Any, name: str) -> None:
        self._findings.append(finding._replace(check=name))
        self._say(finding=self._findings[-1])

    def _say(self, **what: Any) -> None:
        self._line.write(json.dumps(what) + "\n")
        self._line.flush()


def _look(name: str) -> Callable[[Any], Iterator[Any]]:
    """Return a check. What it needs loads here, so that its limit holds for that, too."""
    from nettorrent_mpi.doctor import surroundings

    near = {
        "libraries": surroundings.look_at_libraries,
        "launcher": surroundings.look_at_launcher,
        "cores": surroundings.look_at_cores,
        "limits": surroundings.look_at_limits,
    }
    if name in near:
        return near[name]
    from nettorrent_mpi.doctor import places

    if name in ("/dev/shm", "/tmp", "output"):
        return {
            "/dev/shm": places.look_at_shared_memory,
            "/tmp": places.look_at_session,
            "output": places.look_at_output,
        }[name]
    from nettorrent_mpi.doctor import installed

    return {
        "BLAS": installed.look_at_blas,
        "kernels": installed.look_at_kernels,
        "GPU": installed.look_at_gpus,
        "HDF5": installed.look_at_hdf5,
    }[name]


if __name__ == "__main__":
    main()
