"""Placing decides, by where ranks lie, how a device's arrays travel: by MPI between CPUs, by NCCL between GPUs, and
staged through host memory where NCCL cannot connect them, as with two ranks on one GPU before NCCL 2.30.

A CUDA-aware MPI is not used: it would have to be told of streams, and NCCL does all that it could.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.channels import Channel, MpiChannel, NcclChannel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.staged_channel import PinnedMemory, StagedChannel
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.device import Device, StreamDevice
from nettorrent_mpi.device.events import Stream
from nettorrent_mpi.plan.errors import CommunicationError, LaunchError, NetTorrentError, warn

By = Literal["mpi", "nccl", "staged"]
SHARED_SINCE = 23000  # NCCL 2.30 connects several ranks of one GPU, if asked to
TRIAL = 10.0  # seconds in which two ranks of one GPU have to add up a few numbers
CHECKED = 1.0  # seconds between two looks for errors of NCCL
PATIENCE = 600.0  # seconds that a GPU may wait for others, as PyTorch's default for NCCL


class PlacedRank(NamedTuple):
    """A PlacedRank tells where a rank computes; `gpu` and `bus` tell GPUs of a host apart, parts of one GPU (MIG)
    having one bus."""

    host: str
    kind: str
    gpu: str = ""
    bus: str = ""


class _Watch(threading.Thread):
    """A _Watch is a thread that looks at channels while the host waits for a GPU. If one has failed, or when `until` is
    reached, it aborts them all: then the host goes on, and finds the `failure`."""

    def __init__(self, channels: Sequence[Channel], rank: int):
        super().__init__(name="NCCL's watch", daemon=True)
        self._channels, self._rank, self._ended = channels, rank, False
        self.begun, self.until = threading.Event(), 0.0
        self.failure: CommunicationError | None = None

    def run(self) -> None:
        while not self._ended:
            self.begun.wait()
            time.sleep(max(min(CHECKED, self.until - time.monotonic()), 0.001))
            if self.begun.is_set() and not self._ended:
                self._look()

    def end(self) -> None:
        """Let the thread end."""
        self._ended = True
        self.begun.set()

    def _look(self) -> None:
        try:
            for channel in self._channels:
                channel.check()
            if time.monotonic() < self.until:
                return
            self.failure = CommunicationError(f"the GPU of rank {self._rank} waits in vain for those of other ranks")
        except RuntimeError as error:
            self.failure = CommunicationError(f"NCCL has failed on rank {self._rank}: {error}")
        self._ended = True
        for channel in self._channels:
            with suppress(RuntimeError):
                channel.abort()  # which may not return while there are graphs with operations of the channel


class Connector:
    """A Connector makes the channels of a rank's device, all of one kind, and owns them.

    `by` says how arrays travel. All ranks of the world make one, after their devices. Raises LaunchError on all of them
    if some compute on GPUs and others on CPUs, or have other versions of NCCL.
    """

    def __init__(self, world: World, device: Device):
        self._world, self._device = world, device
        self._library: Any = None
        self._pinned: PinnedMemory | None = None
        self._channels: list[Channel] = []
        self._watch = _Watch(self._channels, world.rank)
        self.by: By = self._choose(world.gather_objects(_place(world, device)))
        if self._watch.is_alive():
            _streams_of(device).wait_by(self.wait)

    def connect(self, groups: Sequence[Group]) -> dict[Group, Channel]:
        """Return a channel for each of this rank's groups. All ranks of the world call, and name their groups in an
        order in which no two of them wait for each other."""
        made: list[Channel] = []
        if self.by == "nccl":
            ids = self._identities(groups)
            made += [
                NcclChannel(self._device, group, self._library, identity)
                for group, identity in zip(groups, ids, strict=True)
            ]
        elif self.by == "staged":
            self._pinned = self._pinned or PinnedMemory(self._device)
            made += [StagedChannel(self._device, group, self._pinned) for group in groups]
        else:
            made += [MpiChannel(self._device, group) for group in groups]
        self._channels += made
        return dict(zip(groups, made, strict=True))

    def wait(self, streams: Sequence[Stream], patience: float = PATIENCE) -> None:
        """Wait until streams have done all work launched so far. Should NCCL fail meanwhile, or take longer than
        `patience` seconds, its communicators are aborted, so that the streams come to an end, and a CommunicationError
        tells of it."""
        self._watch.until = time.monotonic() + patience
        self._watch.begun.set()
        try:
            for stream in streams:
                stream.synchronize()
        except RuntimeError as error:
            raise self._watch.failure or error from error
        finally:
            self._watch.begun.clear()
        if self._watch.failure is not None:
            raise self._watch.failure

    def abort(self) -> None:
        """End what waits on the device for other ranks. No channel can be used afterwards."""
        for channel in self._channels:
            with suppress(RuntimeError):
                channel.abort()

    def close(self) -> None:
        """Free all channels. All ranks call when nothing is in flight, and no graph with their operations is left."""
        if self._watch.is_alive():
            self._watch.end()
            _streams_of(self._device).wait_by(None)
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    def _identities(self, groups: Sequence[Group]) -> list[bytes]:
        if self._library is None:  # this process is alone: NCCL need not be installed
            assert all(group.size == 1 for group in groups)
            return [b""] * len(groups)
        return nccl.identities(self._world, self._library, groups)

    def _choose(self, places: Sequence[PlacedRank]) -> By:
        """Choose how arrays travel, the same on all ranks."""
        kinds = Counter(place.kind for place in places)
        with self._world.agreement():
            _check(places)
        if "gpu" not in kinds:
            return "mpi"
        if self._world.size == 1:
            return "nccl"
        together = _together(places, self._world.rank)
        shared = max(self._world.gather_objects(len(together))) > 1
        reason = self._load(shared)
        if reason is None:
            self._watch.start()
            reason = self._refusal(together) if shared else None
        if reason is None:
            return "nccl"
        if self._watch.is_alive():
            self._watch.end()
            self._watch.join()
        if self._world.rank == 0:
            warn(f"{reason}: GPUs exchange arrays through their hosts' memory, which is slow")
        return "staged"

    def _load(self, shared: bool) -> str | None:
        """Load NCCL, alike on all ranks. Return why it cannot be used, if it cannot on any rank."""
        problem, version = "", 0
        try:
            self._library = nccl.load(shared_gpus=shared)
            version = int(self._library.get_version())
        except LaunchError as error:
            problem = str(error)
        found = self._world.gather_objects((problem, version))
        if all(each for each, _ in found):
            return found[0][0]
        with self._world.agreement():
            for rank, (each, other) in enumerate(found):
                if each:
                    raise LaunchError(f"{each} (on rank {rank})")
                if other != found[0][1]:
                    versions = f"rank {rank} has NCCL {_named(other)}, rank 0 {_named(found[0][1])}"
                    raise LaunchError(f"{versions}: all ranks need the same version")
        if shared and version < SHARED_SINCE:
            return f"ranks share a GPU, and NCCL {_named(version)} does not connect them (2.30 can)"
        return None

    def _refusal(self, together: Sequence[int]) -> str | None:
        """Let the ranks of one GPU add up numbers by NCCL. Return why it cannot, anywhere."""
        problem = ""
        group = self._world.subgroup(together)
        identity = nccl.identities(self._world, self._library, [group])[0]
        try:
            channel = NcclChannel(self._device, group, self._library, identity)
            self._channels.append(channel)
            values = self._device.empty((1000,), np.float32)
            self._device.upload(values, np.ones(1000, np.float32))
            channel.all_reduce(values)
            self.wait([_streams_of(self._device).stream], TRIAL)
            channel.close()
            if not (self._device.on_host(values) == len(together)).all():
                problem = "the sum of a trial is wrong"
        except NetTorrentError as error:
            problem = str(error)
            self.abort()
        self._channels.clear()
        problems = [each for each in self._world.gather_objects(problem) if each]
        group.free()
        return f"ranks share a GPU, and NCCL does not connect them ({problems[0]})" if problems else None


def channel_of(device: Device, group: Group) -> Channel:
    """Return a channel that needs no decision of all ranks: arrays of a GPU travel through the host's memory."""
    return MpiChannel(device, group) if device.kind == "cpu" else StagedChannel(device, group, PinnedMemory(device))


def _place(world: World, device: Device) -> PlacedRank:
    if device.kind == "cpu":
        return PlacedRank(world.host, device.kind)
    gpu = _streams_of(device)
    return PlacedRank(world.host, device.kind, gpu.uuid, gpu.bus)


def _streams_of(device: Device) -> StreamDevice:
    assert isinstance(device, StreamDevice)
    return device


def _check(places: Sequence[PlacedRank]) -> None:
    for rank, place in enumerate(places):
        if place.kind != places[0].kind:
            raise LaunchError(
                f"rank 0 on {places[0].host} computes on a {places[0].kind.upper()}, rank {rank} on {place.host} on a "
                f"{place.kind.upper()}: all ranks need the same `device`"
            )


def _together(places: Sequence[PlacedRank], rank: int) -> list[int]:
    """Return the ranks that compute on the same GPU as this one, or on a part of it."""
    own = places[rank]
    return [
        number
        for number, place in enumerate(places)
        if place.host == own.host and (place.gpu == own.gpu or (place.bus and place.bus == own.bus))
    ]


def _named(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
