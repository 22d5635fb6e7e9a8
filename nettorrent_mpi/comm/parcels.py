"""Parcels carry one array of a device between two teams, as messages of a launch that has others, too: what
`link.Transfer` is on CPUs, where MPI moves each transfer on its own.

    for parcel in sent: parcel.pack()
    launch([message for parcel in (*sent, *received) for message in parcel.messages])
    for parcel in received: parcel.unpack()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nettorrent_mpi.comm.channels import Channel, Message
from nettorrent_mpi.comm.link import Part
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device


class _Staged(NamedTuple):
    view: Array  # the part of the array
    staging: Array  # the message
    add: bool


class Parcel:
    """A Parcel is all messages of one array, on one side. The peers of its parts are members of the channel's group.

    A part that is not contiguous in memory, or that is added to others (partial gradients), goes through a staging
    array. Parts are added in the order in which they are given. `messages` stay the same, and nothing here waits.
    """

    def __init__(self, device: Device, channel: Channel, array: Array, parts: Sequence[Part], *, sending: bool):
        self.array, self.sending = array, sending
        self.messages: list[Message] = []
        self._ops = device.ops
        self._staged: list[_Staged] = []
        for part in parts:
            view = array[slice(*part.rows), ..., slice(*part.features)]
            if view.size == 0:
                continue
            message = view
            if part.add or not view.flags.c_contiguous:
                message = device.empty(view.shape, view.dtype)
                self._staged.append(_Staged(view, message, part.add))
            self.messages.append(Message(channel, sending, message, part.peer))

    def pack(self) -> None:
        """Copy the array's present contents into the messages, before the launch."""
        if self.sending:
            for view, staging, _ in self._staged:
                self._ops.copy(staging, view)

    def unpack(self) -> None:
        """Copy the messages into the array, or add them to it, after the launch."""
        if not self.sending:
            for view, staging, add in self._staged:
                if add:
                    self._ops.add(view, staging, view)
                else:
                    self._ops.copy(view, staging)
