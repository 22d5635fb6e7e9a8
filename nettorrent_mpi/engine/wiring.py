"""The wiring holds a rank's groups, shared memory, links and buffers, derived from (topology, world) and disposable at
any step.

It follows from the rank's position in the topology. Between neighbouring stages of a replica lies a link: in the
forward direction each rank of the reading team gets all inputs of its rows (x_bI) from the ranks that own them (y_bo);
in the backward direction the same pieces travel the other way, as partial sums over the reading team's cols that the
owner adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.link import Part, Transfer
from nettorrent_mpi.comm.ring import Rings
from nettorrent_mpi.comm.shared import BACKING, Ask, SharedMemory, room, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.rows import private
from nettorrent_mpi.device.arrays import Array, Shape, Workspace, aligned
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.usage import free_memory
from nettorrent_mpi.plan.actions import buffers
from nettorrent_mpi.plan.blocks import Grid, Span, redistribute, span
from nettorrent_mpi.plan.errors import warn

FORWARD, BACKWARD = 0, 1


class WiredTeam:
    """Implements nn.layer.Team with real groups: the collective operations of layers among the ranks of a stage."""

    def __init__(self, holders: Group, cols: Group):
        self._holders, self._cols = holders, cols
        self.cols = cols.size
        self.col = cols.index

    def sum_over_rows(self, values: Array) -> None:
        """All-reduce over all ranks that hold other rows of the micro-batch: of the team, and of all replicas where
        they are exact."""
        self._holders.all_reduce(values)

    def sum_over_cols(self, values: Array) -> None:
        """All-reduce over the cols of the team."""
        self._cols.all_reduce(values)

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        """All-gather: whole_b..C <- part_b..c of all cols. Every col's part travels flat and is then put in place."""
        if self.cols == 1:
            np.copyto(whole, part)
            return
        rest = whole.shape[:-1]
        size = int(np.prod(rest))
        counts = [size * span(whole.shape[-1], self.cols, c).size for c in range(self.cols)]
        flat = workspace.scratch("gather", (sum(counts),))
        self._cols.all_gather(part.reshape(-1), flat, counts)
        for c, piece in self._slices(flat, counts, rest):
            np.copyto(whole[..., slice(*c)], piece)

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        """Reduce-scatter: part_b..c <- this col's slice of the sum over cols of partial_whole_b..C."""
        if self.cols == 1:
            np.copyto(part, partial_whole)
            return
        rest = partial_whole.shape[:-1]
        size = int(np.prod(rest))
        counts = [size * span(partial_whole.shape[-1], self.cols, c).size for c in range(self.cols)]
        flat = workspace.scratch("scatter", (sum(counts),))
        for c, piece in self._slices(flat, counts, rest):
            np.copyto(piece, partial_whole[..., slice(*c)])
        self._cols.reduce_scatter(flat, part.reshape(-1), counts)

    def _slices(self, flat: Array, counts: list[int], rest: Shape) -> list[tuple[Span, Array]]:
        """Return (features, their part of the flat array) for every col."""
        found, start = [], 0
        features = sum(counts) // max(int(np.prod(rest)), 1)
        for c, count in enumerate(counts):
            own = span(features, self.cols, c)
            found.append((own, flat[start : start + count].reshape(*rest, own.size)))
            start += count
        return found


class Wiring:
    """The wiring of one rank: its groups, shared memory, links and buffers, all MPI objects that an engine has. It is
    made for one world and closes everything that it made, in the order of creation.

    The groups: `everyone` has all ranks of the world; `holders` those that hold the same neurons and keep the same
    weights: the rows of the team, over all replicas where the exchange is exact; `all_holders` the same for blocks that
    every col holds; `cols` the cols of this row; `peers` the same position in every replica; `replica` all ranks among
    which the network is held once and every gradient is summed; `readers` the ranks of the first stage on this node,
    which share the data set's inputs.

    `slots` is the number of micro-batches that this rank holds between their forward pass and the end of their backward
    pass.
    """

    def __init__(self, world: World, plan: Plan, slots: int):
        topology, options, exact = plan.topology, plan.options, plan.exact
        self.world, self.topology = world, topology
        self.place = topology.place(world.rank)
        self.slots, self.exact = slots, exact
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
        self._groups: dict[tuple[int, ...], Group] = {}
        self.everyone = self.channel(world)
        self._groups[tuple(range(world.size))] = self.everyone
        # Groups are made kind by kind on every rank, so that no two ranks wait for each other in different groups.
        holders = topology.exact_group(stage, col) if exact else topology.row_group(replica, stage, col)
        self.holders = self._group(holders)
        self.all_holders = self._group(topology.swarm(stage) if exact else topology.team(replica, stage))
        self.cols = self._group(topology.col_group(replica, stage, row))
        self.replica = self.everyone if exact else self._group(topology.replica(replica))
        self.peers = self._group([world.rank] if exact else topology.peers(stage, row, col))
        swarm = topology.swarm(0) if self.is_first else [world.rank]
        self.readers = self._group([rank for rank in swarm if world.nodes[rank] == world.nodes[world.rank]])
        self.team = WiredTeam(self.holders, self.cols)
        self.rings = Rings()
        self.buffers = buffers(stage, slots)
        # A ring one longer than the slots lets the next micro-batch arrive while all slots are in use. On the first
        # stage, where nothing arrives, the last buffer is for the rows that are gathered ahead.
        self.ring = self.buffers.inputs
        local = span(outputs[-1], self.cols.size, col).size
        self._dy_shape = (*outputs[:-1], local)

        def made(count: int, shape: Shape) -> list[Array]:
            return [aligned(most_rows * int(np.prod(shape)), options.dtype) for _ in range(count)]

        self._x = made(self.ring + self.is_first, inputs)
        self._dy = made(0 if self.is_last else self.buffers.dy, self._dy_shape)
        self._dx = made(0 if self.is_first else self.buffers.dx, inputs)
        self._views: dict[tuple[int, int], Array] = {}
        self._transfers: dict[tuple[int, bool, int, int], Transfer] = {}

    # -- groups and shared memory -----------------------------------------------------------------------------------

    def _group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks of the world. Its members alone call, in the same order of groups."""
        key = tuple(ranks)
        if key not in self._groups:
            self._groups[key] = self.everyone.subgroup(key)
            self._made.append(self._groups[key])
        return self._groups[key]

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
        the same order, and MPI keeps the order of messages.
        """
        key = (direction, sending, of, array.ctypes.data)
        transfer = self._transfers.get(key)
        if transfer is None:
            parts = self._parts(direction, of, sending)
            transfer = Transfer(self.everyone, array, parts, direction, sending=sending)
            self._transfers[key] = transfer
        return transfer

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

    def close(self) -> None:
        """Free all MPI objects. All ranks call when nothing is in flight; the arrays may not be used afterwards."""
        for transfer in self._transfers.values():
            transfer.free()
        self._transfers.clear()
        self.rings.free()
        for memory in self._memories:
            memory.free()
        for group in self._made:
            group.free()
        self._memories.clear()
        self._made.clear()
        self._groups.clear()


def _local(part: Span, own: Span) -> Span:
    return Span(part.start - own.start, part.stop - own.start)
