"""The engine: a network on a topology, ready to do step n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.comm.mpi import Group
from nettorrent_mpi.comm.shared import node_of, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.dataset import Allocate, Dataset, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.blocks import gather
from nettorrent_mpi.engine.exchange import ExactExchange
from nettorrent_mpi.engine.feed import Feed
from nettorrent_mpi.engine.pipeline import Pipeline
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.trace import Trace
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.nn.backend import Array
from nettorrent_mpi.nn.losses import check_fit, make_loss
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.nn.specs import Spec
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.schedule import add_transfers, build, forward_only, peak_stored
from nettorrent_mpi.plan.topology import Topology


@dataclass(frozen=True)
class Options:
    """How to train, as far as the engine is concerned."""

    loss: Spec
    optimizer: Spec
    batch_size: int = 128
    micro_batches: int = 4
    pipeline: str = "1f1b"
    clip_norm: float | None = None
    dtype: Any = "float32"
    seed: int = 1
    augment: Sequence[str] = ()
    trace: bool = False


class Scores(NamedTuple):
    """What an evaluation gives; accuracy is None where right and wrong are not defined."""

    loss: float
    accuracy: float | None


class Engine:
    """One rank's part of the training. Every rank makes one, of the same arguments, and calls the same methods."""

    def __init__(self, world: World, network: Network, topology: Topology, options: Options):
        self.world, self.network, self.topology, self.options = world, network, topology, options
        self.place = topology.place(world.rank)
        stage = topology.stages[self.place.stage]
        actions = build(
            options.pipeline, len(topology.stages), options.micro_batches, clip=options.clip_norm is not None
        )
        check(topology, actions)
        self._training = actions[self.place.stage]
        self.layers = network.stage(stage.first, stage.stop, stage.cols, self.place.col)
        self.wiring = Wiring(
            world,
            topology,
            inputs=network.inputs(stage.first),
            outputs=network.inputs(stage.stop),
            slots=peak_stored(self._training),
            most_rows=topology.batch_rows(self.place, options.batch_size, options.micro_batches, 0).size,
            dtype=options.dtype,
        )
        self.optimizer = make_optimizer(options.optimizer)
        self.state = State(
            self.layers.parameters,
            self.optimizer,
            dtype=options.dtype,
            seed=options.seed,
            sums=self.wiring.sums,
            swarm=self.wiring.swarm,
        )
        exchange = ExactExchange(world, self.state, self.optimizer, options.clip_norm)
        self.trace = Trace() if options.trace else None
        self.pipeline = Pipeline(
            self.wiring,
            self.layers,
            self.state,
            exchange,
            make_loss(options.loss),
            seed=options.seed,
            trace=self.trace,
        )

    # -- data -------------------------------------------------------------------------------------------------------

    def open_data(self, dataset: Dataset, sampler: Sampler) -> None:
        """Let this rank hold what it needs of the data set: the inputs on the first stage, in memory that the ranks of
        a node share, and the targets on the last. Collective over the ranks of the first stage."""
        self.dataset, self.sampler = dataset, sampler
        self._augment = Augment(self.options.augment, dataset.shape) if self.options.augment else None
        allocate = _shared_memory(node_of(self.wiring.swarm)) if self.wiring.is_first else _no_memory

        def feed_from(split: Split) -> Feed:
            return Feed(split, reads_inputs=self.wiring.is_first, reads_targets=self.wiring.is_last, allocate=allocate)

        self._train = feed_from(dataset.train)
        self._test = feed_from(dataset.test) if dataset.test else None
        for feed in (self._train, self._test):
            if feed is not None:
                feed.read_targets(self._check_targets)

    def _check_targets(self, targets: Array) -> None:
        """ShapeError or DataError where the loss cannot have these targets with this network's outputs."""
        loss, network = self.options.loss, self.network
        shape = network.output_shape
        check_fit(loss, network.output_name, shape, targets.shape[1:], targets.dtype, self.dataset.classes)
        make_loss(loss).check_targets(targets, shape)

    # -- training ---------------------------------------------------------------------------------------------------

    def step(self, n: int, rate: float) -> int:
        """Do step n (counted from 0) at this learning rate; gives the mini-batch's rows. Raises NonFiniteError."""
        rows = self.sampler.rows(n)
        self._train.choose(rows, self._augment, self.sampler.augment_key(n) if self._augment else 0)
        self.pipeline.run(
            self._training,
            self._train,
            micro_batches=self.options.micro_batches,
            training=True,
            step=n,
            rate=rate,
        )
        return len(rows)

    def training_loss(self) -> float:
        """The mean loss of the rows trained on since the last call. Collective over all ranks."""
        return self._scores().loss

    def evaluate_test(self) -> Scores | None:
        """Loss and accuracy on the test set, None without one. Collective over all ranks."""
        if self._test is None or self.dataset.test is None:
            return None
        return self._evaluate(self._test, np.arange(self.dataset.test.rows))

    def evaluate_validation(self) -> Scores | None:
        """Loss and accuracy on the validation rows, None without any. Collective over all ranks."""
        if not len(self.sampler.validation_rows):
            return None
        return self._evaluate(self._train, self.sampler.validation_rows)

    def _evaluate(self, feed: Feed, rows: Array) -> Scores:
        """All rows in one stream of micro-batches as large as those of training, so that the pipeline fills once."""
        before = self.pipeline.tally.take()
        pieces = -(-len(rows) // span(self.options.batch_size, self.options.micro_batches, 0).size)
        actions = add_transfers(forward_only(len(self.topology.stages), pieces))[self.place.stage]
        feed.choose(rows)
        self.pipeline.run(actions, feed, micro_batches=pieces, training=False)
        scores = self._scores()
        self.pipeline.tally.add(*before)
        return scores

    def _scores(self) -> Scores:
        loss, correct, rows, unknown = self.world.sum_numbers(*self.pipeline.tally.numbers())
        self.pipeline.tally.take()
        return Scores(loss / max(rows, 1), None if unknown else correct / max(rows, 1))

    # -- the model --------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """On rank 0: the whole network's arrays, "<layer>/<name>"; elsewhere nothing. Collective over all ranks."""
        return gather(self.world, self.topology, self.network, self.state.params)

    def close(self) -> None:
        """Finish what is under way and give everything back to MPI. Collective over all ranks."""
        self.pipeline.drain()
        self.world.barrier()
        self.state.free()
        self.wiring.free()


def _shared_memory(node: Group) -> Allocate:
    def allocate(shape: tuple[int, ...], dtype: Any, fill: Any) -> Array:
        return share(node, shape, dtype, fill)

    return allocate


def _no_memory(shape: tuple[int, ...], dtype: Any, fill: Any) -> Array:
    raise AssertionError("only ranks of the first stage hold inputs")
