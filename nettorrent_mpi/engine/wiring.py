"""The wiring holds a rank's groups, shared memory, links and buffers, derived from (topology, world) and disposable at
any step.

It follows from the rank's position in the topology. Between neighbouring stages of a replica lies a link: in the
forward direction each rank of the reading team gets all inputs of its rows (x_bI) from the ranks that own them (y_bo);
in the backward direction the same pieces travel the other way, as partial sums over the reading team's cols that the
owner adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import numpy as np

from nettorrent_mpi.comm.channel_team import ChannelTeam
from nettorrent_mpi.comm.channels import Message, launch
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.link import Part, Transfer
from nettorrent_mpi.comm.parcels import Parcel
from nettorrent_mpi.comm.placing import Connector
from nettorrent_mpi.comm.ring import Rings
from nettorrent_mpi.comm.shared import BACKING, Ask, SharedMemory, room, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.rows import private
from nettorrent_mpi.device.arrays import Array, Shape, as_dtype
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.usage import free_memory
from nettorrent_mpi.plan.actions import Buffers
from nettorrent_mpi.plan.blocks import Grid, Span, redistribute, span
from nettorrent_mpi.plan.errors import warn
from nettorrent_mpi.plan.topology import compact

FORWARD, BACKWARD = 0, 1


class Wiring:
    """A Wiring has one rank's groups, shared memory, links and buffers, all MPI objects that an engine has. It is made
    for one world and closes everything that it made, in the order of creation.

    The groups: `everyone` has all ranks of the world; `holders` those that hold the same neurons and keep the same
    weights: the rows of the team, over all replicas where the exchange is exact; `all_holders` the same for blocks that
    every col holds; `cols` the cols of this row; `peers` the same position in every replica; `replica` all ranks among
    which the network is held once and every gradient is summed; `readers` the ranks of the first stage on this node,
    which share the data set's inputs.

    `have` are its buffers; `slots` is the number of micro-batches that this rank holds between their forward pass and
    the end of their backward pass.
    """

    def __init__(self, world: World, plan: Plan, device: Device, have: Buffers):
        topology, options, exact = plan.topology, plan.options, plan.exact
        self.world, self.topology = world, topology
        self.place = topology.place(world.rank)
        self._device, self.slots, self.exact = device, have.slots, exact
        replica, stage, row, col = self.place
        self.is_first = stage == 0
        self.is_last = stage == len(topology.stages) - 1
        inputs = plan.network.inputs(topology.stages[stage].first)  # one row's whole shape of what the stage reads
        outputs = plan.network.inputs(topology.stages[stage].stop)  # and of what it writes
        most_rows = topology.batch_rows(self.place, options.batch_size, options.micro_batches, 0).size
        self._inputs, self._outputs = inputs, outputs
        self._made: list[Group] = []
        self._memories: list[SharedMemory] = []
        self._unshared: list[tuple[str, int, int, str]] = []  # host, bytes asked for, bytes taken besides, why
        self._groups: dict[Sequence[int], Group] = {}
        self.everyone = self.channel(world)
        self._groups[range(world.size)] = self.everyone
        # Groups are made kind by kind on every rank, so that no two ranks wait for each other in different groups.
        holders = topology.exact_group(stage, col) if exact else topology.row_group(replica, stage, col)
        self.holders = self._group(holders)
        self.all_holders = self._group(topology.swarm(stage) if exact else topology.team(replica, stage))
        self.cols = self._group(topology.col_group(replica, stage, row))
        self.replica = self.everyone if exact else self._group(topology.replica(replica))
        alone = range(world.rank, world.rank + 1)
        self.peers = self._group(alone if exact else topology.peers(stage, row, col))
        swarm = topology.swarm(0) if self.is_first else alone
        here = [rank for rank in swarm if world.nodes[rank] == world.nodes[world.rank]]
        self.readers = self._group(swarm if len(here) == len(swarm) else compact(here))
        links = self._link_groups() if device.kind == "gpu" else {}
        wanted = [self.holders, self.all_holders, self.cols, self.replica, self.peers, *links.values()]
        self._connector = Connector(world, device)
        self.channels = self._connector.connect(list(dict.fromkeys(wanted)))
        self._links = {lower: self.channels[group] for lower, group in links.items()}
        for lower in self._links:
            self._meet(lower)
        self.team = ChannelTeam(device, self.channels[self.holders], self.channels[self.cols])
        self.rings = Rings()
        self.buffers = have
        # A ring one longer than the slots lets the next micro-batch arrive while all slots are in use. On the first
        # stage, where nothing arrives, the last buffer is for the rows that are gathered ahead.
        self.ring = self.buffers.inputs
        local = span(outputs[-1], self.cols.size, col).size
        self._dy_shape = (*outputs[:-1], local)

        def made(count: int, shape: Shape) -> list[Array]:
            return [device.empty((most_rows * prod(shape),), as_dtype(options.dtype)) for _ in range(count)]

        self._x = made(self.ring + self.is_first, inputs)
        self._dy = made(0 if self.is_last else self.buffers.dy, self._dy_shape)
        self._dx = made(0 if self.is_first else self.buffers.dx, inputs)
        self._views: dict[tuple[int, int], Array] = {}
        self._transfers: dict[tuple[int, bool, int, int], Transfer] = {}
        self._parcels: dict[tuple[int, bool, int, int], Parcel] = {}

    # -- groups and shared memory -----------------------------------------------------------------------------------

    def _link_groups(self) -> dict[int, Group]:
        """Return the groups of this rank's links, by their lower stage: both teams of each. Links do not overlap with
        those of every other stage, so that no two ranks wait for each other in different ones."""
        replica, stage = self.place.replica, self.place.stage
        lower = [s for s in (stage - 1, stage) if 0 <= s < len(self.topology.stages) - 1]
        return {s: self._group(self._link_ranks(replica, s)) for s in sorted(lower, key=lambda s: s % 2)}

    def _meet(self, lower: int) -> None:
        """Let the ranks of a link send each other something. NCCL connects two ranks when they first do, and their
        hosts wait for each other: inside a step one of them might wait for its GPU, which waits for the other."""
        channel, stage = self._links[lower], self.topology.stages[lower]
        inside = stage.rows * stage.cols  # members before the others
        others = range(inside, channel.group.size) if self.place.stage == lower else range(inside)
        sent, received = (self._device.zeros((len(others),), "float32") for _ in range(2))
        ways = ((True, sent), (False, received))
        launch(
            [Message(channel, way, array[i : i + 1], other) for way, array in ways for i, other in enumerate(others)]
        )

    def _link_ranks(self, replica: int, lower: int) -> range:
        return range(self.topology.team(replica, lower).start, self.topology.team(replica, lower + 1).stop)

    def _group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks of the world. Its members alone call, in the same order of groups."""
        if ranks not in self._groups:
            self._groups[ranks] = self.everyone.subgroup(ranks)
            self._made.append(self._groups[ranks])
        return self._groups[ranks]

    def channel(self, group: Group) -> Group:
        """Return a duplicate of a group for one purpose, whose messages cannot match any others. All members call."""
        self._made.append(group.duplicate())
        return self._made[-1]

    def share(self, among: Group, asks: Sequence[Ask]) -> list[SharedMemory]:
        """Allocate memory that groups on one node share, as `comm.shared.share`; where a node has not got it, nothing.
        All members of `among` call."""
        made, lack = share(among, asks)
        self._memories += made
        if lack is not None:
            mine = [ask for ask in asks if ask.group.index == 0]
            self._unshared += [(self.world.host, a.bytes, a.group.size * a.alone - a.bytes, lack) for a in mine]
        return made

    def shared_rows(self, shape: Shape, dtype: Any, fill: Callable[[Array], None]) -> Array:
        """Return an array that one of the `readers` fills for all of them, or each for itself where they cannot share
        it. All of them call."""
        size, readers = int(np.prod(shape, dtype=np.int64)), self.readers
        ask = Ask(readers, 0, size, dtype, size * np.dtype(dtype).itemsize)
        made = self.share(readers, [ask]) if readers.size > 1 and size else []
        if not made:
            return private(shape, dtype, fill)
        array = made[0].take_common(size).reshape(shape)
        made[0].fill(lambda: fill(array))
        return array

    def has_room(self, size: int) -> bool:
        """Whether the node of the `readers` can hold so many bytes for them in half of its free memory: once, or for
        each where shared memory has no room. All of them call."""
        told = self.readers.gather_objects((room(), free_memory()))
        copies = 1 if size <= min(shareable for shareable, _ in told) else len(told)
        return 2 * copies * size <= min(free for _, free in told)

    def warn_of_copies(self) -> None:
        """Warn on rank 0 of memory that ranks could not share. All ranks call."""
        found = [each for told in self.everyone.gather_objects(self._unshared) for each in told]
        if found and self.world.rank == 0:
            host, _, _, lack = found[0]
            others = len({each[0] for each in found}) - 1
            wanted = sum(each[1] for each in found if each[0] == host) / 1e6
            more = sum(each[2] for each in found if each[0] == host) / 1e6
            warn(
                f"{BACKING} on {host} cannot hold {wanted:.1f} MB of weights and rows that its ranks could share "
                f"({lack}): they keep copies of their own, which takes {more:.1f} MB more memory there"
                + (f", and likewise on {others} more host{'s' if others > 1 else ''}" if others else "")
                + "; enlarge it (a container's: docker run --shm-size), or start fewer ranks"
            )

    # -- buffers ----------------------------------------------------------------------------------------------------

    def x(self, micro_batch: int, rows: int) -> Array:
        """Return the input buffer of a micro-batch: (rows, *inputs)."""
        return self._view(self._x[micro_batch % self.ring], rows, self._inputs)

    def ahead(self, rows: int) -> Array:
        """Return the first stage's buffer for the next micro-batch: (rows, *inputs)."""
        return self._view(self._x[-1], rows, self._inputs)

    def take_ahead(self, micro_batch: int) -> None:
        """Swap buffers: `ahead` becomes the micro-batch's input buffer, and the former one is free for the next."""
        place = micro_batch % self.ring
        self._x[place], self._x[-1] = self._x[-1], self._x[place]

    def dy(self, micro_batch: int, rows: int) -> Array:
        """Return the buffer for the gradient that the next stage sends: (rows, *local outputs)."""
        return self._view(self._dy[micro_batch % self.buffers.dy], rows, self._dy_shape)

    def dx(self, micro_batch: int, rows: int) -> Array:
        """Return the buffer from which the gradient goes to the previous stage: (rows, *inputs)."""
        return self._view(self._dx[micro_batch % self.buffers.dx], rows, self._inputs)

    def _view(self, memory: Array, rows: int, shape: Shape) -> Array:
        """Return the same view object for the same rows: layers recognise the arrays of the steady state."""
        key = (id(memory), rows)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = memory[: rows * int(np.prod(shape))].reshape(rows, *shape)
        return view

    # -- links ------------------------------------------------------------------------------------------------------

    def receive_x(self, micro_batch: int, rows: int, of: int) -> Transfer:
        """Return the transfer that receives the inputs of a micro-batch of `of` rows in this replica."""
        return self._transfer(FORWARD, self.x(micro_batch, rows), of, sending=False)

    def send_y(self, y: Array, of: int) -> Transfer:
        """Return the transfer that sends the outputs to the next stage."""
        return self._transfer(FORWARD, y, of, sending=True)

    def receive_dy(self, micro_batch: int, rows: int, of: int) -> Transfer:
        """Return the transfer that receives the outputs' gradient from the next stage."""
        return self._transfer(BACKWARD, self.dy(micro_batch, rows), of, sending=False)

    def send_dx(self, micro_batch: int, rows: int, of: int) -> Transfer:
        """Return the transfer that sends the inputs' gradient to the previous stage."""
        return self._transfer(BACKWARD, self.dx(micro_batch, rows), of, sending=True)

    def _transfer(self, direction: int, array: Array, of: int, *, sending: bool) -> Transfer:
        """Return a transfer, made on first use and found again by what it moves and where that lies.

        The direction suffices as the tag: between two ranks lies at most one link, both go through the micro-batches in
        the same order, and MPI keeps the order of messages. They travel in the replica's group: one whose ranks all
        live does not need the others.
        """
        key = (direction, sending, of, array.ctypes.data)
        transfer = self._transfers.get(key)
        if transfer is None:
            first = 0 if self.exact else self.topology.replica(self.place.replica)[0]
            parts = [part._replace(peer=part.peer - first) for part in self._parts(direction, of, sending)]
            transfer = Transfer(self.replica, array, parts, direction, sending=sending)
            self._transfers[key] = transfer
        return transfer

    def parcel(self, kind: Literal["x", "y", "dx", "dy"], array: Array, of: int) -> Parcel:
        """Return the parcel that carries an array of a micro-batch of `of` rows on a GPU: x and dy are received, y and
        dx sent. It is made on first use, like transfers."""
        direction, sending = FORWARD if kind in ("x", "y") else BACKWARD, kind in ("y", "dx")
        key = direction, sending, of, id(array)  # arrays of the steady state are always the same objects
        parcel = self._parcels.get(key)
        if parcel is None:
            lower = self.place.stage - (kind in ("x", "dx"))
            ranks = self._link_ranks(self.place.replica, lower)
            parts = [part._replace(peer=ranks.index(part.peer)) for part in self._parts(direction, of, sending)]
            parcel = self._parcels[key] = Parcel(self._device, self._links[lower], array, parts, sending=sending)
        return parcel

    @property
    def capturable(self) -> bool:
        """Whether what the groups' channels do can be captured in a graph: the same on all ranks."""
        return all(channel.capturable for channel in self.channels.values())

    def _parts(self, direction: int, of: int, sending: bool) -> list[Part]:
        """Return this rank's messages for one micro-batch of `of` rows in its replica."""
        upstream = self.place.stage - (1 if (direction == FORWARD) != sending else 0)
        shape = self._outputs if upstream == self.place.stage else self._inputs
        writer, reader = self.topology.stages[upstream], self.topology.stages[upstream + 1]
        source, target = Grid(writer.rows, writer.cols), Grid(reader.rows, reader.cols)
        mine_is_source = upstream == self.place.stage
        mine = self.topology.stages[self.place.stage]
        index = self.place.row * mine.cols + self.place.col
        own_rows = span(of, mine.rows, self.place.row)
        own_cols = span(shape[-1], mine.cols, self.place.col) if mine_is_source else Span(0, shape[-1])
        peers = self.topology.team(self.place.replica, upstream + 1 if mine_is_source else upstream)
        parts = []
        for piece in redistribute(of, shape[-1], source, target):
            here, there = (piece.source, piece.target) if mine_is_source else (piece.target, piece.source)
            if here == index:
                adds = mine_is_source and not sending and there % target.cols > 0
                parts.append(Part(peers[there], _local(piece.rows, own_rows), _local(piece.cols, own_cols), adds))
        return parts

    def abandon(self) -> None:
        """Give up what is in flight, after the world was revoked. The arrays may not be used afterwards."""
        self._connector.abort()
        for transfer in self._transfers.values():
            transfer.abandon()
        self.rings.abandon()

    def close(self) -> None:
        """Free all MPI objects. All ranks call when nothing is in flight; the arrays may not be used afterwards."""
        for transfer in self._transfers.values():
            transfer.free()
        self._transfers.clear()
        self._parcels.clear()
        self.rings.free()
        self._connector.close()
        self.channels.clear()
        for memory in self._memories:
            memory.free()
        for group in self._made:
            group.free()
        self._memories.clear()
        self._made.clear()
        self._groups.clear()


def _local(part: Span, own: Span) -> Span:
    return Span(part.start - own.start, part.stop - own.start)
