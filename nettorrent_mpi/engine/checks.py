"""A whole setup is checked: what cannot be meant is refused, what is doubtful gets a warning of one line."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.rows import Dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Shape
from nettorrent_mpi.engine.layout import AS_FAST, on_fewer_ranks, one_stage, predicted
from nettorrent_mpi.nn.fit import has_accuracy
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import BuddyCopies, Elite, Gossip
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.specs import AvgPool2d, Conv2d, Flatten, LayerSpec, Linear, MaxPool2d, Residual
from nettorrent_mpi.plan.topology import Topology

IMAGES = (Conv2d, MaxPool2d, AvgPool2d)  # layers that tell height and width from channels
MUCH, LONG = 1.5, 10.0  # a layout is told of if it takes so many times as long as `auto`, and so many seconds more


def doubts(config: Config, sampler: Sampler, topology: Topology, pieces: int, steps: int) -> list[str]:
    """Return what is doubtful about the rows and the length of a run, one line each."""
    found = []
    train, exchange = config.train, config.exchange
    rows, batch_size = len(sampler.training_rows), train.batch_size
    if batch_size > rows:
        found.append(
            f"train.batch_size: {batch_size}, but there are only {rows} training rows: every mini-batch has all of "
            "them, and an epoch is one step"
        )
    each = span(span(batch_size, pieces, 0).size, topology.replicas, 0).size  # rows of a micro-batch in one replica
    most, s = max((stage.rows, s) for s, stage in enumerate(topology.stages))
    if most > each:
        found.append(
            f"layout: stage {s} divides the rows of a micro-batch over {most} ranks of a replica, but there are {each} "
            f"(train.batch_size {batch_size}, {pieces} micro-batches, {topology.replicas} replicas): the others idle"
        )
    elite = isinstance(exchange, Elite)
    if train.stop_at is not None and not elite and train.evaluate_every * sampler.steps_per_epoch >= steps > 0:
        found.append(
            f"train.stop_at: the {train.stop_at.metric} is measured every {train.evaluate_every} epochs "
            "(evaluate_every), and so at the end of the run alone: it stops nothing"
        )
    if isinstance(exchange, Elite) and exchange.every_samples > steps * batch_size > 0:
        found.append(
            f"exchange.elite.every_samples: {exchange.every_samples}, but the run has {steps * batch_size}: the "
            "replicas are compared at its end"
        )
    if isinstance(config.redundancy, BuddyCopies) and topology.size > 1 and library.loaded() and not survivable():
        found.append(
            "redundancy: buddy, but here a run ends when a rank is lost: no copies are kept; under Open MPI's "
            "mpirun --with-ft ulfm the other ranks go on"
        )
    if isinstance(exchange, Gossip) and exchange.every > steps > 0:
        found.append(
            f"exchange.gossip.every: {exchange.every} steps, but the run has {steps}: the replicas agree at its end"
        )
    return found


def channels_first(config: Config, shape: Shape) -> str | None:
    """Return a warning if the images seem to be stored with their channels first, where the axes matter."""
    matters = bool(config.data.augment) or isinstance(_first_reader(config.model.layers), IMAGES)
    if not matters or len(shape) != 3 or shape[0] not in (1, 3, 4) or min(shape[1:]) <= 4:
        return None
    height, width, channels = shape
    if height == 1 and width != channels:  # as a sequence has it
        return None
    return (
        f"data: rows of shape {shape} are taken for images of {height} x {width} pixels in {channels} channels; "
        "if the channels come first, store (height, width, channels): x.transpose(0, 2, 3, 1)"
    )


def _first_reader(layers: Sequence[LayerSpec]) -> LayerSpec | None:
    """Return the first layer to which the axes of a row matter, or for which they stop to: flatten."""
    for layer in layers:
        if isinstance(layer, Residual):
            inner = _first_reader((*layer.layers, *layer.shortcut))
            if inner is not None:
                return inner
        elif isinstance(layer, (*IMAGES, Flatten, Linear)):
            return layer
    return None


def unjudged(dataset: Dataset, sampler: Sampler) -> list[str]:
    """Return a warning, if nothing in a file of data tells how well the network will do on other rows."""
    if dataset.file is None or dataset.test is not None or len(sampler.validation_rows):
        return []
    text = "has no test set (x_test, y_test), so nothing shows how well the network does on rows that it has not seen"
    return [f"{dataset.file} {text}; add one, or data.validation: 0.1"]


def check_judged(config: Config, network: Network, dataset: Dataset, sampler: Sampler) -> None:
    """Raise ConfigError if rows are to be held back and are not, or if nothing gives the accuracy that is to end the
    training."""
    validation = config.data.validation
    if validation and not len(sampler.validation_rows):
        raise ConfigError(
            f"{validation} of {dataset.train.rows} rows is less than one: raise it, or leave it out",
            key="data.validation",
        )
    if config.train.stop_at is None:
        return
    stop = config.train.stop_at
    key = "train.stop_at.accuracy" if stop.accuracy is not None else "train.stop_at.patience"
    if dataset.test is None and not validation:
        raise ConfigError(
            "is never measured: there are neither test rows nor validation rows; add data.validation: 0.1", key=key
        )
    loss, units = config.model.loss, network.output_shape[-1]
    if stop.accuracy is None and stop.metric == "loss":
        return
    if not has_accuracy(loss, units, dataset.classes):
        targets = "numbers" if dataset.classes is None else "labels"
        raise ConfigError(
            f"is never measured: {loss.kind} of {units} output{'s' if units > 1 else ''} and {targets} has none; leave "
            "it out, or write train.stop_at: {patience: 3, metric: loss}",
            key=key,
        )


def slow(config: Config, network: Network, topology: Topology, steps: int, machine: Machine | None = None) -> list[str]:
    """Return a warning where the default layout makes the run much longer than need be, and one where fewer ranks would
    be faster: predictions of a few milliseconds, for runs that last longer."""
    machine = machine or Machine()
    ours, ranks = predicted(config, network, topology, machine).seconds, topology.size
    if config.layout != "layers" or ranks == 1 or steps * ours < LONG:
        return []
    found, where = [], machine.source or f"on cores of {machine.flops / 1e9:.0f} GFLOP/s"
    auto = predicted(config, network, one_stage(config, network, ranks, machine), machine).seconds  # or less
    if ours >= MUCH * auto and steps * (ours - auto) >= LONG:
        found.append(
            f"layout: layers is predicted to take {ours / auto:.1f} times as long as auto ({steps * ours:,.0f} s, not "
            f"{steps * auto:,.0f} s, {where}): set layout=auto, or compare them with --dry-run"
        )
    seconds, fewer = min(((each.seconds, count) for count, each in on_fewer_ranks(config, network, ranks, machine)))
    if AS_FAST * seconds < ours:
        found.append(
            f"layout: layers is predicted to be slower on {ranks} ranks than on {fewer} ({steps * ours:,.0f} s, not "
            f"{steps * seconds:,.0f} s, {where}): compare them with --dry-run"
        )
    return found


def check_batch_norm(config: Config, network: Network, topology: Topology, pieces: int) -> None:
    """Raise ConfigError if a batch norm would see one row at a time, which has no variance."""
    separate = 1 if config.exact else topology.replicas  # that take separate batch statistics
    rows = span(config.train.batch_size, pieces, pieces - 1).size // separate
    if network.batch_norms_of_vectors and rows <= 1:
        name, apart = network.batch_norms_of_vectors[0], f" of each of the {separate} replicas" if separate > 1 else ""
        raise ConfigError(
            f"{config.train.batch_size} rows in {pieces} micro-batch{'es' if pieces > 1 else ''} leave "
            f"{name} a single row{apart} at a time, which has no variance: take at least "
            f"{2 * pieces * separate} rows" + (", or fewer micro_batches" if pieces > 1 else ""),
            key="train.batch_size",
        )


def check_exchange(config: Config, topology: Topology, pieces: int) -> None:
    """Raise ConfigError if the configured exchange is impossible with this number of replicas, or if a replica that
    trains on its own rows would get none."""
    exchange, replicas, batch_size = config.exchange, topology.replicas, config.train.batch_size
    if replicas == 1 and isinstance(exchange, Elite | Gossip):
        nobody = "take weights from" if isinstance(exchange, Elite) else "average with"
        raise ConfigError(
            f"changes nothing with 1 replica: there is nobody to {nobody}; "
            "give layout: {replicas: N} or exchange: allreduce",
            key=f"exchange.{exchange.kind}",
        )
    if isinstance(exchange, Gossip):
        make_pairing(exchange.pairing, replicas, config.seed)
    most = span(batch_size, pieces, 0).size  # rows of the largest micro-batch, one for each replica at most
    if not config.exact and most < replicas:
        raise ConfigError(
            f"{batch_size} rows in {pieces} micro-batch{'es' if pieces > 1 else ''} leave {replicas - most} of the "
            f"{replicas} replicas nothing to train on: take at least {pieces * (replicas - 1) + 1} rows"
            + (", or fewer micro_batches" if pieces > 1 else ""),
            key="train.batch_size",
        )
