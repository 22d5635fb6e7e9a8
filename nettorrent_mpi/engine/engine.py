"""An engine trains a network on a world according to a plan. It can detach from the world and attach to another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Allocate, Dataset, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.class_weights import class_weights, weightless
from nettorrent_mpi.engine.devices import open_device
from nettorrent_mpi.engine.metrics import Metrics
from nettorrent_mpi.engine.pipeline import Pipeline
from nettorrent_mpi.engine.rank_numbers import RankNumbers
from nettorrent_mpi.engine.resharding import Blocks, move
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.engine.state import PARAMETERS, State
from nettorrent_mpi.engine.state_blocks import ReadBlocks, StateBlocks
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.engine.work import Work
from nettorrent_mpi.exchange import make_exchange
from nettorrent_mpi.nn.fit import check_fit, out_of_reach
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import DataError, warn
from nettorrent_mpi.plan.moves import Holding, whole


class Engine:
    """An engine is one rank's part of a training. All ranks of a world make one with the same plan and call the same
    methods.

    With the exact exchange (`plan.exact`) all replicas are equal. Otherwise each has its own weights, `exchange` makes
    them agree, and an evaluation scores the weights that the replicas hold at that time (`exchange.shown`).
    """

    def __init__(self, world: World, plan: Plan, blocks: Blocks | None = None):
        """Attach to a world: see `attach`."""
        self.attach(world, plan, blocks)

    # -- the three lifetimes: plan, wiring, state -------------------------------------------------------------------

    dataset: Dataset  # once data is open, like the next one
    sampler: Sampler  # divides the data set's rows into mini-batches
    moving: list[Callable[[], None]]  # calls that let messages move while this rank computes; more may be added
    loss_of_zeros = 0.0  # of the training rows, for outputs of 0; known to one rank of the last stage
    _opened = False

    def attach(self, world: World, plan: Plan, blocks: Blocks | None = None, sampler: Sampler | None = None) -> None:
        """Train on this world according to this plan from now on; with `blocks`, from the state of another engine, and
        with `sampler`, on the same data set divided by it.

        All ranks of the world call. Ranks that hold blocks of the same state without being in this world call
        `blocks.give()` at the same time. Optimizer and exchange must be the same as before; if the number of replicas
        changes, all replicas start from the average.
        """
        self.world, self.plan = world, plan
        network, topology, options = plan.network, plan.topology, plan.options
        self.network, self.topology, self.options = network, topology, options
        self.place = topology.place(world.rank)
        stage = topology.stages[self.place.stage]
        self.device = open_device(world, options)
        self.layers = network.stage(stage.first, stage.stop, stage.cols, self.place.col)
        self.schedule = StageSchedule(plan, self.place.stage)
        if options.device == "gpu":
            from nettorrent_mpi.engine.gpu_estimate import reserve  # nothing that a run on CPU cores needs

            with world.agreement():
                reserve(self.device, plan, self.place.stage)
        self.wiring = wiring = Wiring(world, plan, self.device, self.schedule.buffers)
        self.optimizer = make_optimizer(options.optimizer)
        parameters, late = self.layers.parameters, self.schedule.late
        self.state = state = State(plan, wiring, self.device, parameters, self.optimizer, versions=late)
        if blocks is None:
            state.initialise(options.seed)
            state.forget_versions()
        self.metrics = Metrics(self.device)
        self.exchange = make_exchange(
            options.exchange,
            state.owned(),
            wiring.channel(wiring.peers),
            self.device,
            wiring.channels[wiring.peers],
            optimizer=options.optimizer,
            seed=options.seed,
            batch_size=options.batch_size,
            report_every=options.report_every,
        )
        clip_norm = options.clip_norm
        self.update = Update(wiring, self.device, state, self.optimizer, self.exchange, self.metrics, clip_norm)
        self.numbers = RankNumbers(topology, world.rank, self.metrics, self.update, self.exchange)
        self.blocks = StateBlocks(wiring, self.device, state, self.exchange, self.update, self.numbers)
        pipeline: type[Pipeline] = Pipeline
        if self.device.kind != "cpu":
            from nettorrent_mpi.engine.device_pipeline import DevicePipeline as pipeline  # noqa: N813
        self.pipeline = pipeline(
            plan,
            wiring,
            self.device,
            self.layers,
            state,
            self.update,
            self.metrics,
            self._progress(),
            self.schedule.ahead,
        )
        self._class_weights: Array | None = None  # in the loss, on the device
        self._left = 0  # steps planned until the ranks come to rest; 0: they are at rest
        self.steps = 0  # done so far
        if blocks is not None:
            wiring.everyone.barrier()  # Open MPI's ranks crash where a group is revoked that they still make
            self.restore(blocks.take, blocks.steps, blocks.replicas)
        if self._opened:
            self.open_data(self.dataset, sampler or self.sampler)

    def detach(self) -> Blocks:
        """Leave the world: free all MPI objects and keep the training state in memory. All ranks call, at rest.

        Afterwards the engine is attached again or closed.
        """
        arrays = {holding: np.array(array) for holding, array in self.blocks.held().items()}
        self.close()
        return Blocks(self.world, arrays, self.exchange.count, self.steps)

    def restore(self, read: ReadBlocks, steps: int, replicas: int) -> None:
        """Continue after `steps` steps of a training: see `StateBlocks.restore`. All ranks call, at rest."""
        self.blocks.restore(read, steps, replicas)
        self.steps = steps

    @property
    def whole(self) -> int | None:
        """Return the step after which this rank's own state is whole; None in the middle of an update or an
        exchange."""
        return None if self.exchange.torn and self.wiring.replica.size > 1 else self.update.whole

    def abandon(self) -> None:
        """Give up what is in flight, after the world was revoked because ranks are lost. The engine is attached
        again."""
        self.update.restore(None)
        self.wiring.abandon()
        self.exchange.abandon()

    def close(self) -> None:
        """Finish communication and free all MPI objects. All ranks call, at rest."""
        self.exchange.settle()
        self.pipeline.close()
        self.update.close()
        self.wiring.everyone.barrier()
        self.exchange.close()
        self.wiring.close()
        self.device.close()

    @property
    def bound(self) -> Group:
        """Return the group of ranks that wait for each other inside a step."""
        return self.wiring.everyone if self.exchange.waits_for_peers else self.wiring.replica

    @property
    def may_wait(self) -> bool:
        """Whether the host may wait for the device. In a pipeline without flush a GPU's launches may wait for those of
        a neighbour's next step, whose host would wait for this one, unless all ranks are at rest."""
        return self.device.kind == "cpu" or not self.schedule.asynchronous or self._left == 0

    def settle(self) -> None:
        """Wait for the device, where the host may."""
        if self.may_wait:
            self.device.synchronize()

    def _progress(self) -> Callable[[], None] | None:
        """Let messages move while this rank computes: those of rings, of peers and between stages, which MPI advances
        only when sender and receiver call it."""
        calls = [self.wiring.rings.progress] if self.wiring.rings else []
        calls += [self.exchange.progress] if self.exchange.progress else []
        calls += [self.wiring.replica.progress] if len(self.topology.stages) > 1 else []
        self.moving = calls
        if self.world.size == 1:
            return None

        def all_of_them() -> None:
            for call in calls:
                call()

        return all_of_them

    # -- data -------------------------------------------------------------------------------------------------------

    def open_data(self, dataset: Dataset, sampler: Sampler) -> None:
        """Read what this rank needs of the data set: the inputs on the first stage, in memory that the ranks of a node
        share (and in that of a GPU), and the targets on the last. Collective over the ranks of the first stage."""
        self.dataset, self.sampler, self._opened = dataset, sampler, True
        augment = Augment(self.plan.options.augment, dataset.shape) if self.plan.options.augment else None
        allocate, ahead = self.wiring.shared_rows, self.schedule.ahead
        self.train = self.batches(dataset.train, allocate, sampler=sampler, augment=augment, ahead=ahead)
        self.test = self.batches(dataset.test, allocate) if dataset.test else None
        replica, _, row, col = self.wiring.place
        self._doubt(self.train.doubt() if replica == row == col == 0 else None)
        self.read_targets(dataset)

    def batches(
        self,
        split: Split,
        allocate: Allocate,
        *,
        sampler: Sampler | None = None,
        augment: Augment | None = None,
        **placed: Any,
    ) -> Batches:
        """Open the mini-batches of a split for this engine; `placed` says where they lie on a GPU (see
        `open_batches`)."""
        if self.device.kind == "cpu":
            return Batches(split, self.wiring, allocate, sampler=sampler, augment=augment)
        from nettorrent_mpi.engine.device_batches import open_batches

        sizes = self.options.batch_size, self.options.micro_batches
        return open_batches(
            split, self.wiring, allocate, self.device, *sizes, sampler=sampler, augment=augment, **placed
        )

    def read_targets(self, dataset: Dataset) -> None:
        """Read the targets of a data set that has the same rows. Not collective."""
        self.dataset = dataset
        replica, _, row, col = self.wiring.place
        told = replica == row == col == 0  # the one rank of its stage that warns
        self.train.read_targets(lambda targets: self._begin_loss(targets, told=told), dataset.train)
        if self.test is not None:
            self.test.read_targets(lambda targets: self._check_targets("y_test", targets), dataset.test)

    def _begin_loss(self, targets: Array, *, told: bool) -> None:
        """Check the targets of the training split, and make the loss whose classes have the weights of its rows; if
        `told`, warn of targets that an activation cannot reach, and of classes that cannot be weighed."""
        self._check_targets("y", targets)
        loss, network = self.plan.options.loss, self.plan.network
        outputs = network.output_shape[-1]
        weights = class_weights(loss, targets[self.sampler.training_rows], outputs)
        self.train.weigh(None if weights is None else weights[targets])
        if weights is not None:
            if self._class_weights is None:  # a recorded step keeps the array, whatever targets are read later
                self._class_weights = self.device.empty(weights.shape, self.state.weights_dtype)
                self.pipeline.loss = make_loss(loss, self._class_weights)
            self.device.upload(self._class_weights, weights.astype(self.state.weights_dtype))
        if not told or not targets.size:
            return
        self.loss_of_zeros = make_loss(loss, weights).of_zeros(targets, outputs)
        if self.dataset.classes is None:
            self._doubt(out_of_reach(loss, network.expanded, targets.min(), targets.max()))
        if weights is not None:
            self._doubt(weightless(loss, weights, self.dataset.class_names))

    def _check_targets(self, name: str, targets: Array) -> None:
        """Raise ShapeError or DataError if these targets do not fit the loss and the network's outputs."""
        loss, network = self.plan.options.loss, self.plan.network
        shape = network.output_shape
        check_fit(loss, network.output_name, shape, targets.shape[1:], targets.dtype, self.dataset.classes)
        try:
            make_loss(loss).check_targets(targets, shape, float(np.finfo(self.state.weights_dtype).max))
        except DataError as error:
            raise DataError(f"{name}: {error}", file=self.dataset.file) from None

    def _doubt(self, text: str | None) -> None:
        if text is not None:
            warn(text, alone=True)

    # -- training ---------------------------------------------------------------------------------------------------

    def step(self, n: int, rate: float, left: int = 1) -> int:
        """Run step n (see `prepare`) and return the number of rows of its mini-batch."""
        work = self.prepare(n, rate, left)
        self.pipeline.run(work)
        return work.rows

    def prepare(self, n: int, rate: float, left: int = 1) -> Work:
        """Return the work of step n (counted from 0), the next one, at this learning rate, for the pipeline to run.

        `left` >= 1 is the number of steps until the ranks come to rest, this one included; an asynchronous pipeline
        runs up to `ahead` mini-batches ahead until then. If `left` was so large that all possible receives are posted,
        the next step may pass any number above `ahead`, not only one less.
        """
        schedule, pieces = self.schedule, self.options.micro_batches
        left, first = left if schedule.asynchronous else 1, self._left == 0
        assert schedule.may_follow(self._left, left), (self._left, left)
        self.train.begin_step(n, pieces)
        self._left, self.steps = left - 1, n + 1
        actions = schedule.step(first=first, left=left, parts=self.state.in_parts)
        return Work(actions, self.train, pieces, n, rate=rate * schedule.rate_scale, first=first)

    def forward(self, batches: Batches, rows: Array, *, alone: bool = False, outputs: Array | None = None) -> None:
        """Run these rows (numbers in the batches' split) through the network in one stream of micro-batches as large as
        those of training, so that the pipeline fills once. All ranks call, at rest. `alone`: by each replica for
        itself, else the replicas divide the rows. Without `outputs`, which the last stage writes, scores are added to
        the metrics."""
        assert self._left == 0
        options, replicas = self.plan.options, self.topology.replicas
        most = span(options.batch_size, options.micro_batches, 0).size
        if alone:
            most = max(most // replicas, 1)  # the last one trains on so many, and has no more room
        pieces = -(-len(rows) // most)
        batches.begin_rows(rows, pieces, alone=alone)
        actions = self.schedule.evaluation(pieces)
        step = max(self.steps - 1, 0)  # the last one trained, for the trace
        self.pipeline.run(Work(actions, batches, pieces, step, training=False, outputs=outputs))

    # -- what has been learned ----------------------------------------------------------------------------------------

    def exchange_figures(self) -> dict[str, Any]:
        """Return the exchange's figures, averaged over all ranks, for the report. Collective over all ranks."""
        return {"kind": self.options.exchange.kind, **self.exchange.figures(self.wiring.everyone)}

    def shapes(self) -> dict[str, Shape]:
        """Return the shapes of the network's whole arrays, "<layer>/<name>", in the network's order."""
        network = self.plan.network
        return {key: parameter.shape for key, parameter in network.stage(0, network.weight_layers, 1, 0).parameters}

    def parameters(self, *, everywhere: bool = False) -> dict[str, Array]:
        """Return on rank 0 (or `everywhere`) the first replica's whole arrays, "<layer>/<name>"; elsewhere nothing.
        Collective over all ranks."""
        here = everywhere or self.world.rank == 0
        dtype, on_host = self.state.weights_dtype, self.device.on_host
        arrays = {key: np.empty(shape, dtype) for key, shape in self.shapes().items()} if here else {}
        wanted = {Holding(f"{PARAMETERS}/{key}", whole(array.shape)): array for key, array in arrays.items()}
        # Where replicas are equal, rounded weights are divided among all of them.
        held = self.state.blocks() if self.plan.exact or self.place.replica == 0 else {}
        move(self.wiring.everyone, {holding: on_host(array) for holding, array in held.items()}, wanted)
        return arrays
