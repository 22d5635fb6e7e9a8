"""Channels are made for all groups of a rank at once: which kind they are is decided for the whole world."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.channels import Channel, MpiChannel, NcclChannel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.staged_channel import PinnedMemory, StagedChannel
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.device import Device, StreamDevice
from nettorrent_mpi.plan.errors import warn


def connect(world: World, device: Device, groups: Sequence[Group]) -> dict[Group, Channel]:
    """Return a channel for each of this rank's groups. All ranks of the world call, and name their groups in an order
    in which no two of them wait for each other."""
    if device.kind == "cpu":
        return {group: MpiChannel(device, group) for group in groups}
    assert isinstance(device, StreamDevice)
    places = world.gather_objects((world.host, device.uuid))
    if len(set(places)) < len(places):
        if world.rank == 0:
            warn("ranks share a GPU, so their arrays travel through the host's memory: start one rank for each GPU")
        pinned = PinnedMemory(device)
        return {group: StagedChannel(device, group, pinned) for group in groups}
    if world.size == 1:
        return {group: NcclChannel(device, group, None, b"") for group in groups}
    library = nccl.load()
    identities = nccl.identities(world, library, groups)
    return {
        group: NcclChannel(device, group, library, identity) for group, identity in zip(groups, identities, strict=True)
    }


def channel_of(device: Device, group: Group) -> Channel:
    """Return a channel that needs no decision of all ranks: arrays of a GPU travel through the host's memory."""
    if device.kind == "cpu":
        return MpiChannel(device, group)
    assert isinstance(device, StreamDevice)
    return StagedChannel(device, group, PinnedMemory(device))
