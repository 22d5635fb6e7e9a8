"""The engine: a network on a topology, ready to do step n."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.shared import node_of, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Allocate, Dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.gathering import gather
from nettorrent_mpi.engine.pipeline import Pipeline
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.tally import Tally
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.exchange import Shards, make_exchange
from nettorrent_mpi.nn.losses import check_fit, make_loss
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.actions import Actions, Kind, peak_stored, step_end
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.cost import rows_shared
from nettorrent_mpi.plan.schedule import STREAMS, build, evaluation
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.stream import mean_staleness, reach, staleness_bound, stream_step


class Engine:
    """One rank's part of the training. Every rank makes one, of the same arguments, and calls the same methods.

    With the exact exchange (`exact`) all replicas are the same; otherwise each has its own weights, `replicas` says
    what they have in common, and an evaluation is of what the replicas are at that time (see `Replicas.shown`).
    """

    def __init__(self, world: World, plan: Plan):
        self.world, self.plan = world, plan
        self.network, self.topology, self.options = network, topology, options = (
            plan.network,
            plan.topology,
            plan.options,
        )
        self.device = make_device("cpu", options.kernels)
        self.place = topology.place(world.rank)
        self.exact = plan.exact
        stage = topology.stages[self.place.stage]
        stages = len(topology.stages)
        self.asynchronous = isinstance(options.pipeline, choices.Async) and stages > 1
        self._slots = self._prove()
        late = staleness_bound(stages, options.micro_batches, self.place.stage) if self.asynchronous else 0
        self._rate_factor = 1.0
        if isinstance(options.pipeline, choices.Async) and options.pipeline.staleness_aware and self.asynchronous:
            self._rate_factor = 1 / (1 + mean_staleness(stages, options.micro_batches, self.place.stage))
        # Mini-batches that are begun before the present one is done.
        self.ahead = staleness_bound(stages, options.micro_batches, 0) if self.asynchronous else 0
        self._left = 0  # steps still planned until the ranks come to rest; 0: they are
        self.layers = network.stage(stage.first, stage.stop, stage.cols, self.place.col)
        self.wiring = Wiring(
            world,
            topology,
            inputs=network.inputs(stage.first),
            outputs=network.inputs(stage.stop),
            slots=self._slots[self.place.stage],
            most_rows=topology.batch_rows(self.place, options.batch_size, options.micro_batches, 0).size,
            dtype=options.dtype,
            exact=self.exact,
        )
        self.optimizer = make_optimizer(options.optimizer)
        self.state = State(
            self.layers.parameters,
            self.optimizer,
            dtype=options.dtype,
            seed=options.seed,
            sums=self.wiring.sums,
            whole=self.wiring.whole,
            stashes=late,
            device=self.device,
            rows=rows_shared(topology, options.batch_size, self.exact),
        )
        self._end = self._step_end(parts=bool(self.state.operands))
        self.tally = Tally()
        self.exchange = self.replicas = make_exchange(
            options.exchange,
            self._shards(),
            self.wiring.peers,
            self.device,
            optimizer=options.optimizer,
            seed=options.seed,
            batch_size=options.batch_size,
            report_every=options.report_every,
            share=self.state.share,
            fence=self.state.meet,
        )
        self.update = Update(
            self.wiring.replica,
            self.state,
            self.optimizer,
            options.clip_norm,
            self.exchange,
            self.tally,
            self.device.ops,
        )
        self.trace = Trace() if options.trace else None
        self.pipeline = Pipeline(
            self.wiring,
            self.layers,
            self.state,
            self.update,
            make_loss(options.loss),
            self.tally,
            seed=options.seed,
            trace=self.trace,
            device=self.device,
        )

    def _prove(self) -> list[int]:
        """Check the schedule of all ranks; the micro-batches that each stage holds at once."""
        options = self.options
        lists = build(
            options.pipeline.kind, len(self.topology.stages), options.micro_batches, end=self._step_end(parts=False)
        )
        check(self.topology, lists)
        return [peak_stored(actions) for actions in lists]

    def _step_end(self, parts: bool) -> tuple[Kind, ...]:
        return step_end(clip=self.options.clip_norm is not None, exact=self.exact, parts=parts)

    def _shards(self) -> Shards:
        """What this rank owns."""
        segments, statistics = self.state.segments, self.state.statistics
        return Shards(
            [segment.params[segment.shard] for segment in segments],
            {name: [segment.optimizer[name] for segment in segments] for name in self.optimizer.states},
            [flat.params[flat.shard] for flat in statistics],
        )

    @property
    def bound(self) -> Group:
        """The ranks that wait for each other inside a step."""
        return self.world if self.exchange.waits_for_peers else self.wiring.replica

    # -- data -------------------------------------------------------------------------------------------------------

    def open_data(self, dataset: Dataset, sampler: Sampler) -> None:
        """Let this rank hold what it needs of the data set: the inputs on the first stage, in memory that the ranks of
        a node share, and the targets on the last. Collective over the ranks of the first stage."""
        self.dataset, self.sampler = dataset, sampler
        augment = Augment(self.options.augment, dataset.shape) if self.options.augment else None
        allocate = _shared_memory(node_of(self.wiring.swarm)) if self.wiring.is_first else _no_memory
        self._train = Batches(dataset.train, self.wiring, allocate, sampler=sampler, augment=augment)
        self._test = Batches(dataset.test, self.wiring, allocate) if dataset.test else None
        for batches in (self._train, self._test):
            if batches is not None:
                batches.read_targets(self._check_targets)

    def _check_targets(self, targets: Array) -> None:
        """ShapeError or DataError where the loss cannot have these targets with this network's outputs."""
        loss, network = self.options.loss, self.network
        shape = network.output_shape
        check_fit(loss, network.output_name, shape, targets.shape[1:], targets.dtype, self.dataset.classes)
        make_loss(loss).check_targets(targets, shape)

    # -- training ---------------------------------------------------------------------------------------------------

    def step(self, n: int, rate: float, left: int = 1) -> int:
        """Do step n (counted from 0) at this learning rate; gives the mini-batch's rows. Raises NonFiniteError.

        `left` >= 1 says how many steps will be done until the ranks come to rest, this one included; an asynchronous
        pipeline runs up to `ahead` mini-batches ahead until then. While it is above `ahead`, the next step may be given
        any number above `ahead`, not just one less, if `left` was so large that receives are posted as far as can be.
        """
        micro_batches = self.options.micro_batches
        left, first = left if self.asynchronous else 1, self._left == 0
        far = reach(len(self.topology.stages), micro_batches)
        assert first or left == self._left or (left > self.ahead and self._left >= far), (left, self._left)
        self._train.begin_step(n, micro_batches)
        actions = _step_actions(
            self.options.pipeline.kind,
            len(self.topology.stages),
            micro_batches,
            self.place.stage,
            first,
            min(left, far + 1),
            self._end,
        )
        self.pipeline.run(
            actions,
            self._train,
            micro_batches=micro_batches,
            training=True,
            step=n,
            rate=rate * self._rate_factor,
            first=first,
        )
        self._left = left - 1
        return self._train.batch_size(0)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate_test(self) -> Scores | None:
        """Loss and accuracy on the test set, None without one. Collective over all ranks, which are at rest.

        The replicas divide the rows, so they have to be the same (`Replicas.shown`).
        """
        if self._test is None or self.dataset.test is None:
            return None
        return self._evaluate(self._test, np.arange(self.dataset.test.rows))[0]

    def evaluate_validation(self) -> Scores | None:
        """Loss and accuracy on the validation rows, None without any; otherwise as `evaluate_test`."""
        if not len(self.sampler.validation_rows):
            return None
        return self._evaluate(self._train, self.sampler.validation_rows)[0]

    def compare_replicas(self) -> list[Scores] | None:
        """Each replica's loss and accuracy on all validation rows, None without any. Collective over all ranks."""
        if not len(self.sampler.validation_rows):
            return None
        return self._evaluate(self._train, self.sampler.validation_rows, alone=True)

    def _evaluate(self, batches: Batches, rows: Array, *, alone: bool = False) -> list[Scores]:
        """All rows in one stream of micro-batches as large as those of training, so that the pipeline fills once.

        `alone`: by each replica for itself, giving the scores of each; else together.
        """
        assert self._left == 0
        before = self.tally.take()
        most = span(self.options.batch_size, self.options.micro_batches, 0).size
        if alone:
            most = max(most // self.topology.replicas, 1)  # the last one trains on so many, and has no more room
        pieces = -(-len(rows) // most)
        actions = evaluation(self._slots, pieces)[self.place.stage]
        batches.begin_rows(rows, pieces, alone=alone)
        step = self._train.step  # the last one trained, for the trace
        self.pipeline.run(actions, batches, micro_batches=pieces, training=False, step=step)
        sums = np.zeros((self.topology.replicas, 4))
        sums[self.place.replica if alone else 0] = self.tally.take()
        self.world.sum(sums)
        self.tally.add(*before)
        self.tally.recent = (0.0, 0.0)
        return [scores(*replica) for replica in (sums if alone else sums[:1])]

    # -- the model --------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """On rank 0: the first replica's arrays, "<layer>/<name>"; elsewhere nothing. Collective over all ranks."""
        return gather(self.world, self.topology, self.network, self.state.params)

    def exchange_figures(self) -> dict[str, Any]:
        """What all ranks did on average to agree, for people. Collective over all ranks."""
        return {"kind": self.options.exchange.kind, **self.exchange.figures(self.world)}

    def close(self) -> None:
        """Finish what is under way and give everything back to MPI. Collective over all ranks."""
        self.exchange.settle()
        self.pipeline.drain()
        self.world.barrier()
        self.exchange.close()
        self.update.close()
        self.state.free()
        self.wiring.free()


def scores(loss: float, correct: float, rows: float, unknown: float) -> Scores:
    """From a tally's sums."""
    return Scores(float(loss) / max(rows, 1), None if unknown else float(correct) / max(rows, 1))


@lru_cache(maxsize=64)
def _step_actions(
    pipeline: str, stages: int, micro_batches: int, stage: int, first: bool, left: int, end: Sequence[Kind]
) -> Actions:
    """The complete list of a stage for one step."""
    if pipeline in STREAMS and stages > 1:
        return stream_step(stages, micro_batches, stage, first=first, left=left, end=end)
    return build(pipeline, stages, micro_batches, end=end)[stage]


def _shared_memory(node: Group) -> Allocate:
    def allocate(shape: tuple[int, ...], dtype: Any, fill: Any) -> Array:
        return share(node, shape, dtype, fill)

    return allocate


def _no_memory(shape: tuple[int, ...], dtype: Any, fill: Any) -> Array:
    raise AssertionError("only ranks of the first stage hold inputs")
