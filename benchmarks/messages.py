"""This benchmark measures what a small message costs two ranks: in the mailbox of gossip and around a ring, against
mpi4py alone.

    mpirun -n 2 python -m benchmarks.messages [--count 2000] [--repeats 5] [--write FILE]

`there and back`: a message of 1 KB goes to the other rank, which answers; microseconds for each message, the median of
the repeats, whose sides take turns. The mailbox has as many receives posted as gossip's has. `lap`: an array of 256 KB
is reduced around a ring of both, in one piece and in eight, beside the same messages of mpi4py with the same addition.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.mail import Mail
from nettorrent_mpi.comm.ring import Ring, Rings
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.speedup.machine import describe_host

BODY, RECEIVES, LARGE = 1024 - 64, (1, 8, 64), 1 << 16  # bytes; posted receives; elements of float32


def bare(world: World, count: int) -> Callable[[], None]:
    """Return `count` messages there and back by persistent receives and synchronous sends."""
    comm, other = world.comm, 1 - world.index
    sent, came = np.zeros(BODY + 64, np.uint8), np.zeros(BODY + 64, np.uint8)
    receive = comm.Recv_init(came, MPI.ANY_SOURCE, 7)

    def run() -> None:
        for _ in range(count):
            receive.Start()
            if world.index == 0:
                send = comm.Issend(sent, other, 7)
            while not receive.Test():
                pass
            if world.index == 1:
                send = comm.Issend(sent, other, 7)
            while not send.Test():
                pass

    return run


def by_mail(mail: Mail, world: World, count: int) -> Callable[[], None]:
    """Return the same through a mailbox."""
    other = 1 - world.index

    def send() -> None:
        while not mail.can_send(other):
            pass
        letter = mail.letter()
        mail.send(letter, other)
        mail.put_back(letter)

    def run() -> None:
        for _ in range(count):
            if world.index == 0:
                send()
            came = mail.take()
            while not came:
                came = mail.take()
            mail.release(came[0])
            if world.index == 1:
                send()

    return run


def bare_laps(world: World, pieces: int, count: int) -> Callable[[], None]:
    """Return `count` laps of messages and additions, by mpi4py alone."""
    comm, other = world.comm, 1 - world.index
    parts = [span(LARGE // 2, pieces, i) for i in range(pieces)]
    sent, own, came = (np.zeros(LARGE // 2, np.float32) for _ in range(3))
    sends = [comm.Send_init(sent[p.start : p.stop], other, 100 + i) for i, p in enumerate(parts)]
    receives = [comm.Recv_init(came[p.start : p.stop], other, 100 + i) for i, p in enumerate(parts)]

    def run() -> None:
        for _ in range(count):
            MPI.Prequest.Startall(receives)
            MPI.Prequest.Startall(sends)
            for _ in parts:
                p = parts[MPI.Request.Waitany(receives)]
                np.add(own[p.start : p.stop], came[p.start : p.stop], out=own[p.start : p.stop])
            MPI.Request.Waitall(sends)

    return run


def laps(world: World, pieces: int, count: int, first_tag: int) -> tuple[Rings, Callable[[], None]]:
    """Return the same around the package's rings."""
    rings, counts = Rings(), [LARGE // 2] * 2
    grads, sums = np.zeros(LARGE, np.float32), np.zeros(LARGE // 2, np.float32)
    around = [Ring(world, range(2), first_tag + i, grads, sums, grads, counts, i, pieces) for i in range(pieces)]
    for ring in around:
        rings.add(ring)

    def run() -> None:
        for _ in range(count):
            for ring in around:
                ring.reduce.begin()
            for ring in around:
                rings.finish(ring.reduce)
            for ring in around:
                ring.reduce.sent()

    return rings, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="messages, or laps, of a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="a file of JSON for the results")
    options = parser.parse_args()
    world, device = World(), make_device("cpu")
    assert world.size == 2, "start it with mpirun -n 2"
    mails = [Mail(world, device, BODY, receives, 200 + receives) for receives in RECEIVES]
    sides = {"there and back, mpi4py": bare(world, options.count)}
    for mail, receives in zip(mails, RECEIVES, strict=True):
        sides[f"there and back, mailbox, {receives} receives"] = by_mail(mail, world, options.count)
    made = []
    for pieces in (1, 8):
        rings, run = laps(world, pieces, options.count, 1000 * pieces)
        made.append(rings)
        sides[f"lap, {pieces} pieces, mpi4py"] = bare_laps(world, pieces, options.count)
        sides[f"lap, {pieces} pieces, ring"] = run
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            world.barrier()
            began = time.perf_counter()
            run()
            took[name].append((time.perf_counter() - began) / options.count * 1e6)
    microseconds = {name: round(median(each) / (2 if "back" in name else 1), 2) for name, each in took.items()}
    for mail in mails:
        mail.settle()
        mail.close()
    for rings in made:
        rings.free()
    if world.index == 0:
        report: dict[str, Any] = {"host": describe_host(), "mpi": world.library, "microseconds": microseconds}
        print(json.dumps(microseconds, indent=1), flush=True)
        if options.write is not None:
            options.write.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    world.close()


if __name__ == "__main__":
    main()
