"""The engine: a network that trains on a world, by a plan. It can leave the world, and attach to another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.from_arrays import unlabelled
from nettorrent_mpi.data.rows import Dataset, private
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.metrics import Metrics
from nettorrent_mpi.engine.pipeline import Pipeline, Work
from nettorrent_mpi.engine.resharding import Blocks, move, of_replica, takes
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.engine.state import PARAMETERS, State
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.exchange import Shards, make_exchange
from nettorrent_mpi.nn.losses import check_fit, make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.cost import rows_shared
from nettorrent_mpi.plan.errors import NonFiniteError
from nettorrent_mpi.plan.moves import Holding, whole
from nettorrent_mpi.plan.scores import Scores, mean_scores


class Engine:
    """One rank's part of a training. All ranks of a world make one, of the same plan, and call the same methods.

    With the exact exchange (`plan.exact`) all replicas are the same; otherwise each has its own weights, `exchange`
    says what they have in common, and an evaluation is of what the replicas are at that time (`exchange.shown`).
    """

    def __init__(self, world: World, plan: Plan, blocks: Blocks | None = None):
        """Attach to a world: see `attach`."""
        self.attach(world, plan, blocks)

    # -- the three lifetimes: plan, wiring, state -------------------------------------------------------------------

    _data: tuple[Dataset, Sampler] | None = None

    def attach(self, world: World, plan: Plan, blocks: Blocks | None = None) -> None:
        """Train on this world by this plan from now on; with `blocks`, from where another engine left off.

        All ranks of the world call. Ranks that hold blocks of the same state, but have no place here, call
        `blocks.give()` at the same time. The optimizer and the exchange have to be the same as before; where the number
        of replicas is another one, they all go on from the average.
        """
        self.world, self.plan = world, plan
        network, topology, options = plan.network, plan.topology, plan.options
        self.network, self.topology, self.options = network, topology, options
        self.place = topology.place(world.rank)
        stage = topology.stages[self.place.stage]
        self.device = make_device("cpu", options.kernels)
        self.layers = network.stage(stage.first, stage.stop, stage.cols, self.place.col)
        self.schedule = StageSchedule(plan, self.place.stage)
        self.wiring = Wiring(
            world,
            topology,
            inputs=network.inputs(stage.first),
            outputs=network.inputs(stage.stop),
            slots=self.schedule.slots,
            most_rows=topology.batch_rows(self.place, options.batch_size, options.micro_batches, 0).size,
            dtype=options.dtype,
            exact=plan.exact,
        )
        self.optimizer = make_optimizer(options.optimizer)
        self.state = State(
            self.wiring,
            self.device,
            self.layers.parameters,
            self.optimizer,
            options.dtype,
            versions=self.schedule.late,
            rows=rows_shared(topology, options.batch_size, plan.exact),
        )
        if blocks is None:
            self.state.initialise(options.seed)
        self.metrics = Metrics(self.device)
        self.exchange = make_exchange(
            options.exchange,
            Shards(
                [bucket.params[bucket.shard] for bucket in self.state.buckets],
                {name: [b.optimizer[name] for b in self.state.buckets] for name in self.optimizer.states},
                [flat.params[flat.shard] for flat in self.state.statistics],
            ),
            self.wiring.channel(self.wiring.peers),
            self.device,
            optimizer=options.optimizer,
            seed=options.seed,
            batch_size=options.batch_size,
            report_every=options.report_every,
            share=self.state.gather_all,
            fence=self.state.fence,
        )
        self.update = Update(
            self.wiring, self.device, self.state, self.optimizer, self.exchange, self.metrics, options.clip_norm
        )
        self.trace = Trace() if options.trace else None
        self.pipeline = Pipeline(
            self.wiring,
            self.device,
            self.layers,
            self.state,
            self.update,
            make_loss(options.loss),
            self.metrics,
            seed=options.seed,
            trace=self.trace,
            progress=self._progress(),
        )
        self._left = 0  # steps still planned until the ranks come to rest; 0: they are
        self._steps = 0  # done so far
        if blocks is not None:
            self.restore(blocks.take, blocks.steps, blocks.replicas)
        if self._data is not None:
            self.open_data(*self._data)

    def detach(self) -> Blocks:
        """Leave the world: everything is given back to MPI, and what was learned is kept in memory. All ranks call, at
        rest. The engine is closed, or attached again."""
        held = self.blocks()
        arrays = {holding: array.copy() for holding, array in held.items()}
        self.close()
        return Blocks(self.world, arrays, self.exchange.count, self._steps)

    def blocks(self) -> dict[Holding, Array]:
        """What this rank holds: views of the live arrays where all replicas are the same; of replicas that differ a
        copy of their average, and each one's own besides (resharding.Blocks tells the names). Collective over all
        ranks, which come to rest."""
        self.exchange.settle()
        shards = self.state.shards(self.exchange.memories())
        if self.exchange.count == 1:
            return self.state.blocks() | shards
        own = self.state.blocks() | shards
        with self.exchange.shown():
            average = {holding: block.copy() for holding, block in self.state.blocks().items()}
        for holding, shard in shards.items():
            average[holding] = shard.copy()
            self.wiring.peers.sum(average[holding])
            self.device.ops.divide(average[holding], self.exchange.count)
        mine = {Holding(of_replica(self.place.replica, h.name), h.box): array for h, array in own.items()}
        return average | mine

    def restore(self, read: Callable[[str, Mapping[Holding, Array]], None], steps: int, replicas: int) -> None:
        """Go on after so many steps of a training in which so many replicas differed (1: none). `read(prefix, wanted)`
        fills the wanted arrays with those of the names that begin with `prefix`. All ranks call.

        Replicas that differ first become their average, with which estimates of compressed messages begin; then, if
        there are as many as before, each becomes its own.
        """
        own = f"{of_replica(self.place.replica, '')}"
        for prefix in ("", own)[: takes(replicas, self.exchange.count)]:
            self.state.fence()
            read(prefix, self.state.blocks() | self.state.shards(self.exchange.memories()))
            self.state.fence()
            if not prefix:
                self.exchange.averaged()
        self.exchange.recall(steps)
        self._steps = steps

    def close(self) -> None:
        """Finish what is under way and give everything back to MPI. All ranks call, at rest."""
        self.exchange.settle()
        self.pipeline.drain()
        self.update.close()
        self.wiring.everyone.barrier()
        self.exchange.close()
        self.wiring.close()

    @property
    def dataset(self) -> Dataset:
        """The data set that is open."""
        assert self._data is not None, "no data set is open"
        return self._data[0]

    @property
    def sampler(self) -> Sampler:
        """What divides the data set's rows into mini-batches."""
        assert self._data is not None, "no data set is open"
        return self._data[1]

    @property
    def bound(self) -> Group:
        """The ranks that wait for each other inside a step."""
        return self.wiring.everyone if self.exchange.waits_for_peers else self.wiring.replica

    def _progress(self) -> Callable[[], None] | None:
        """What lets messages move while this rank computes: those of rings, of peers, and between stages, which go on
        their way only when sender and receiver look after them."""
        calls = [self.wiring.rings.progress] if self.wiring.rings else []
        calls += [self.exchange.progress] if self.exchange.progress else []
        calls += [self.wiring.everyone.progress] if len(self.topology.stages) > 1 else []
        if len(calls) < 2:
            return calls[0] if calls else None

        def all_of_them() -> None:
            for call in calls:
                call()

        return all_of_them

    # -- data -------------------------------------------------------------------------------------------------------

    def open_data(self, dataset: Dataset, sampler: Sampler) -> None:
        """Let this rank hold what it needs of the data set: the inputs on the first stage, in memory that the ranks of
        a node share, and the targets on the last. Collective over the ranks of the first stage."""
        self._data = dataset, sampler
        augment = Augment(self.plan.options.augment, dataset.shape) if self.plan.options.augment else None
        allocate = self.wiring.shared_rows
        self._train = Batches(dataset.train, self.wiring, allocate, sampler=sampler, augment=augment)
        self._test = Batches(dataset.test, self.wiring, allocate) if dataset.test else None
        for batches in (self._train, self._test):
            if batches is not None:
                batches.read_targets(self._check_targets)

    def _check_targets(self, targets: Array) -> None:
        """Raise ShapeError or DataError where the loss cannot have these targets with this network's outputs."""
        loss, network = self.plan.options.loss, self.plan.network
        shape = network.output_shape
        check_fit(loss, network.output_name, shape, targets.shape[1:], targets.dtype, self.dataset.classes)
        make_loss(loss).check_targets(targets, shape)

    # -- training ---------------------------------------------------------------------------------------------------

    def step(self, n: int, rate: float, left: int = 1) -> int:
        """Do step n: see `prepare`. Gives the mini-batch's rows."""
        work = self.prepare(n, rate, left)
        self.pipeline.run(work)
        return work.rows

    def prepare(self, n: int, rate: float, left: int = 1) -> Work:
        """What the pipeline is to run in step n (counted from 0), the next one, at this learning rate.

        `left` >= 1 says how many steps will be done until the ranks come to rest, this one included; an asynchronous
        pipeline runs up to `ahead` mini-batches ahead until then. While it is above `ahead`, the next step may be given
        any number above `ahead`, not just one less, if `left` was so large that receives are posted as far as can be.
        """
        schedule, pieces = self.schedule, self.options.micro_batches
        left, first = left if schedule.asynchronous else 1, self._left == 0
        assert schedule.may_follow(self._left, left), (self._left, left)
        self._train.begin_step(n, pieces)
        self._left, self._steps = left - 1, n + 1
        actions = schedule.step(first=first, left=left, parts=self.state.in_parts)
        return Work(actions, self._train, pieces, n, rate=rate * schedule.rate_scale, first=first)

    def check_finite(self) -> None:
        """Raise NonFiniteError on all ranks if one of them has seen a value that is not finite; it names the earliest
        step, and the first layer. All ranks call, at rest."""
        mine = self.pipeline.diverged()
        found = self.wiring.everyone.gather_objects(None if mine is None else (mine[0], self.place.stage, mine[1]))
        seen = [(*each, rank) for rank, each in enumerate(found) if each is not None]
        if seen:
            step, _, layer, rank = min(seen)
            error = NonFiniteError(step=step, layer=layer, rank=rank)
            error.agreed = True
            raise error

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate_test(self) -> Scores | None:
        """Loss and accuracy on the test set, None without one. Collective over all ranks, which are at rest.

        The replicas divide the rows, so they have to be the same (`exchange.shown`).
        """
        test = self.dataset.test
        return None if self._test is None or test is None else self._evaluate(self._test, np.arange(test.rows))[0]

    def evaluate_validation(self) -> Scores | None:
        """Loss and accuracy on the validation rows, None without any; otherwise as `evaluate_test`."""
        rows = self.sampler.validation_rows
        return self._evaluate(self._train, rows)[0] if len(rows) else None

    def compare_replicas(self) -> list[Scores] | None:
        """Each replica's loss and accuracy on all validation rows, None without any. Collective over all ranks."""
        rows = self.sampler.validation_rows
        return self._evaluate(self._train, rows, alone=True) if len(rows) else None

    def _evaluate(self, batches: Batches, rows: Array, *, alone: bool = False) -> list[Scores]:
        """Score all rows in one stream of micro-batches as large as those of training, so that the pipeline fills once.

        `alone`: by each replica for itself, giving the scores of each; else together.
        """
        before = self.metrics.take()
        self._forward(batches, rows, alone=alone)
        sums = np.zeros((self.topology.replicas, 4))
        sums[self.place.replica if alone else 0] = self.metrics.take()[:4]
        self.wiring.everyone.sum(sums)
        self.metrics.put_back(before)
        if not np.isfinite(sums).all():
            self.check_finite()
        return [mean_scores(*replica) for replica in (sums if alone else sums[:1])]

    def predict(self, x: Array) -> Array:
        """Give all ranks the network's outputs (rows, *output_shape) for rows x (rows, *input_shape), which are the
        same on all ranks and are scaled as the data set's are. All ranks call, at rest. Of replicas that differ the
        outputs are those of what is shown (`exchange.shown`). Raises DataError."""
        split = unlabelled(x, self.dataset.train)
        outputs = np.zeros((split.rows, *self.network.output_shape), self.state.dtype)
        if split.rows:
            self._forward(Batches(split, self.wiring, private), np.arange(split.rows), outputs=outputs)
            self.wiring.everyone.sum(outputs)  # zeros where another rank has the row
        return outputs

    def _forward(self, batches: Batches, rows: Array, *, alone: bool = False, outputs: Array | None = None) -> None:
        assert self._left == 0
        options, replicas = self.plan.options, self.topology.replicas
        most = span(options.batch_size, options.micro_batches, 0).size
        if alone:
            most = max(most // replicas, 1)  # the last one trains on so many, and has no more room
        pieces = -(-len(rows) // most)
        batches.begin_rows(rows, pieces, alone=alone)
        actions = self.schedule.evaluation(pieces)
        step = max(self._steps - 1, 0)  # the last one trained, for the trace
        self.pipeline.run(Work(actions, batches, pieces, step, training=False, outputs=outputs))

    def exchange_figures(self) -> dict[str, Any]:
        """What all ranks did on average to agree, for people. Collective over all ranks."""
        return {"kind": self.options.exchange.kind, **self.exchange.figures(self.wiring.everyone)}

    # -- the model --------------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the network's whole arrays, "<layer>/<name>", in the network's order."""
        network = self.plan.network
        return {key: parameter.shape for key, parameter in network.stage(0, network.weight_layers, 1, 0).parameters}

    def parameters(self, *, everywhere: bool = False) -> dict[str, Array]:
        """On rank 0, or `everywhere`: the first replica's whole arrays, "<layer>/<name>"; elsewhere nothing. Collective
        over all ranks."""
        here = everywhere or self.world.rank == 0
        arrays = {key: np.empty(shape, self.state.dtype) for key, shape in self.shapes().items()} if here else {}
        wanted = {Holding(f"{PARAMETERS}/{key}", whole(array.shape)): array for key, array in arrays.items()}
        move(self.wiring.everyone, self.state.blocks() if self.place.replica == 0 else {}, wanted)
        return arrays
