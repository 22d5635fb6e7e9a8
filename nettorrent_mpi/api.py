"""The Python interface: training a network over MPI. The part that works without MPI is in planning.py.

    import nettorrent_mpi as nt

    layers = [nt.Conv2d(16, padding="same", activation="relu"), nt.Flatten(), nt.Linear(10)]
    with nt.Trainer(layers, (x, y, x_test, y_test), optimizer=nt.Adam(0.002), batch_size=64) as trainer:
        for record in trainer.train(epochs=2):
            if trainer.rank == 0:
                print(record.step, record.train_loss, record.test_accuracy)
        trainer.save("model.h5")

runs on one rank as it is, and on four with `mpirun -n 4 python script.py`: all ranks run the same script, pass the same
arguments and call the same methods. The command line is built on the same functions.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from nettorrent_mpi import env

if "mpi4py.MPI" not in sys.modules:
    env.prepare()  # MPI reads its environment when it loads, and so do BLAS threads where NumPy is not loaded yet

from nettorrent_mpi.comm.activity import NOW, OUTSIDE, START, STARTING
from nettorrent_mpi.comm.failures import lost, survivable
from nettorrent_mpi.comm.script_errors import abort_after_error
from nettorrent_mpi.comm.watchdog import Watchdog
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.from_arrays import unlabelled
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import StreamDevice
from nettorrent_mpi.engine.copy_interval import copy_interval
from nettorrent_mpi.engine.devices import choose_device
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluation, Part
from nettorrent_mpi.engine.failover import Failure, Recovery
from nettorrent_mpi.engine.failure import agreed, end_all
from nettorrent_mpi.engine.profiles import most_on_node, read_profiles
from nettorrent_mpi.engine.record import Record
from nettorrent_mpi.engine.saving import Saving
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.engine.trained_on import TrainedOn
from nettorrent_mpi.engine.trainer import TrainingLoop
from nettorrent_mpi.engine.training_files import TrainingFiles
from nettorrent_mpi.nn.rates import check_rates
from nettorrent_mpi.plan.errors import LayoutError, NetTorrentError, UserError, warn
from nettorrent_mpi.planning import Architecture, Data, PlannedRun, configured, has_length, opened

if TYPE_CHECKING:
    from nettorrent_mpi.config.settings import Settings


def watched(world: World, config: Config) -> Watchdog | None:
    """Let a watchdog look after the ranks as the configuration says; return it. All ranks call."""
    times = config.watchdog
    if times == "none":
        world.unwatch()
        return None
    return world.watch(times.report, times.end)


class Trainer:
    """A Trainer trains one network on all ranks of a communicator.

    All ranks make one with the same arguments and call the same methods in the same order. It is a context manager:
    leaving it, also by an error that all ranks raise alike (a UserError for bad input, a NonFiniteError), closes this
    trainer and no other; an error that one rank raises alone ends all ranks of the program at once, because the others
    would wait for it. An error that ends the script has the same effect without `with`; otherwise `close` the trainer.
    """

    def __init__(
        self,
        network: Architecture | PlannedRun,
        data: Data | None = None,
        *,
        comm: Any = None,
        output: str | Path | None = None,
        stop_on_signals: bool | Signals = False,
        **settings: Unpack[Settings],
    ):
        """`network`, `data` and `settings` are those of `plan`, or `network` is its result.

        comm: the mpi4py communicator of the ranks that train (default: MPI.COMM_WORLD; a process that no
        launcher started is alone and uses no MPI). It is duplicated.
        output: a folder for checkpoints, in `checkpoints/`, which no other run may use; None: no checkpoints.
        stop_on_signals: SIGUSR1, SIGUSR2, SIGTERM, SIGINT or SIGHUP to any rank stops the training on all of them, with
        a checkpoint; a second SIGINT raises KeyboardInterrupt.

        Raises UserErrors, on all ranks alike. Gives NetTorrentWarnings, on rank 0 alone.
        """
        START.begin("run folder" if isinstance(comm, World) else "imports")
        self._world = world = comm if isinstance(comm, World) else World(comm)
        self._closers: list[Callable[[], None]] = [] if world is comm else [world.free]
        self._runs: list[weakref.ref[Any]] = []
        signals = Signals() if stop_on_signals is True else stop_on_signals or None
        if signals is not None and signals is not stop_on_signals:
            self._closers.append(signals.close)
        atexit.register(self._end_of_script)
        NOW.enter(STARTING)
        START.reached("MPI")
        try:
            self.planned = self._plan(network, data, settings)
            START.reached("plan")
            if self.setup.topology.size != world.size:
                with world.agreement():
                    raise LayoutError(f"the plan is for {self.setup.topology.size} ranks, not for {world.size}")
            self._watch()
            world.same("plan", self.setup.agreed_line)
            world.same("data set", self.setup.data_line)
            self._engine = Engine(world, self.setup.plan)
            self._closers.insert(0, self._engine.close)
            START.reached("engine")
            with world.agreement():
                self._engine.open_data(self.setup.dataset, self.setup.sampler)
            START.reached("data")
            self._engine.wiring.warn_of_copies()
            config = self.setup.config
            saving = Saving(config.checkpoint, self._engine.sampler.steps_per_epoch)
            every = copy_interval(self.setup)
            self._loop = TrainingLoop(self._engine, config.train, saving, signals, every)
            self._closers.insert(0, self._loop.close)
            folder = None if output is None else Path(output)
            self._files = TrainingFiles(self._engine, self._loop, saving, self.setup, folder)
            self._closers.insert(0, self._files.finish)
            self._closers.append(self._files.close)
            self._recovery = Recovery(self._engine, self._loop, self._files, self._take)
            if world.watchdog is not None:
                world.watchdog.farewell, world.watchdog.emergency = self._files.farewell, self._files.emergency
                self._closers.insert(0, self._forget_state)
            if folder is None and "checkpoint" in settings and world.rank == 0:
                warn("checkpoint is set, but there is no folder for checkpoints: none is written; give output")
            NOW.enter(OUTSIDE)
        except Exception as error:
            if agreed(error, world):
                self.close()
            elif lost(error, world):
                self.abandon()
            raise

    def _plan(self, network: Architecture | PlannedRun, data: Data | None, settings: Mapping[str, Any]) -> PlannedRun:
        world = self._world
        with world.agreement():
            if isinstance(network, PlannedRun):
                if data is not None or settings:
                    raise UserError("a plan has its data and settings already: give them to plan(), not to Trainer()")
                network.setup.dataset.require()
            else:
                dataset = opened(data)
        if isinstance(network, PlannedRun):
            choose_device(world, network.setup.options.device)  # a plan needs no GPU, and a training may
            return network
        shape = None if dataset is None else (dataset.train.rows, dataset.test and dataset.test.rows, dataset.shape)
        world.same("data set or settings", f"{shape} {sorted(settings)}")
        config, known = world.once(lambda: (configured(network, data, dataset, settings), read_profiles()))
        known = replace(known, node=most_on_node(world.nodes))
        watched(world, config)
        device = choose_device(world, config.device)
        with world.agreement():
            setup = set_up(config, world.size, dataset, device=device.kind, known=known)
            planned = PlannedRun(setup, has_length(network, settings))
        if world.rank == 0:
            planned.warn()
        return planned

    def _take(self, setup: Setup) -> None:
        self.planned.setup = setup
        self._watch()

    def _watch(self) -> None:
        """Let the watchdog look after the ranks as the configuration says, and know their places."""
        watchdog = watched(self._world, self.setup.config)
        if watchdog is not None:
            watchdog.places = [self.setup.place_line(rank) for rank in range(self._world.size)]

    # -- progress -----------------------------------------------------------------------------------------------------

    @property
    def setup(self) -> Setup:
        """The setup of the plan: data set, network, layout and options."""
        return self.planned.setup

    @property
    def rank(self) -> int:
        """This rank's number among those that train."""
        return self._world.rank

    @property
    def size(self) -> int:
        """The number of ranks that train."""
        return self._world.size

    @property
    def gpu_bytes(self) -> int:
        """The bytes that this rank's arrays take of its GPU's memory; 0 on CPU cores."""
        device = self._engine.device
        return cast("StreamDevice", device).held_bytes if device.kind == "gpu" else 0

    @property
    def step(self) -> int:
        """Training steps so far, those before a resume included."""
        return self._loop.step

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint from which the training was continued; None: it was not."""
        return self._files.resumed_from

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train of the run's length, or the accuracy that ends it is reached."""
        return self._loop.finished(self.setup.steps)

    @property
    def stopped_by(self) -> str | None:
        """The reason why the latest `train` ended early: "accuracy", "patience" or "signal"; None if it ran to its
        end."""
        return self._loop.stopped_by

    @property
    def diverged(self) -> bool:
        """Whether the training loss, at the latest evaluation, was that of a training that has diverged, though still
        finite."""
        return self._loop.evaluator.diverged

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, *, epochs: int | None = None, steps: int | None = None) -> Iterator[Record]:
        """Train for this many more epochs or steps; by default until nothing is left of the length of the run (the
        settings `epochs` or `steps`, or the configuration's). Yields a record every `report_every` steps and after each
        epoch.

        The learning-rate schedule spans the length of the run, or, if none was set, the length given here. All ranks
        get the same records, each when they reach it. To evaluate, save or predict inside the loop, wait for a record
        with `at_rest`. Leaving the loop early stops all ranks after the same step, a few steps later. Raises
        ConfigError if a warm-up takes all steps, and NonFiniteError on all ranks if the training diverges.
        """
        self._open("train")
        self._files.check_folder()
        whole = self.setup.steps
        with self._world.agreement():
            if epochs is not None and steps is not None:
                raise UserError("epochs and steps cannot both be given: leave one out")
            for name, number in (("epochs", epochs), ("steps", steps)):
                if number is not None and not (number >= 0 and number == round(number)):
                    raise UserError(f"{name} is {number!r}, but has to be a whole number of at least 0")
        self._world.same("length of training", f"epochs={epochs} steps={steps}")
        until = self.step if self.finished else whole
        if epochs is not None or steps is not None:
            until = self.step + (steps if steps is not None else (epochs or 0) * self._loop.epoch_steps)
        horizon = max(until, whole) if self.planned.has_length else until
        if not self.planned.has_length:
            with self._world.agreement():
                doubt = check_rates(self.setup.config.train.schedule, horizon, self._loop.epoch_steps)
            if doubt is not None and self.rank == 0:
                warn(doubt)
        run = (self._survive if survivable() else self._loop.train)(until, horizon)
        self._runs = [other for other in self._runs if other() is not None] + [weakref.ref(run)]
        return run

    def _survive(self, until: int, horizon: int) -> Iterator[Record]:
        """Train, also when ranks are lost."""
        while True:
            try:
                yield from self._loop.train(until, horizon)
                self._world.agree()
                return
            except Exception as error:
                if self.recover(error):
                    return

    def recover(self, error: Exception) -> bool:
        """Let the training go on without ranks that are lost, where this error says that some are and MPI lets the
        others go on (`mpirun --with-ft ulfm`); otherwise raise it. Returns whether the caller of any rank has left the
        loop over `train`, which calls this itself. All survivors call.

        The training goes back to the newest state that the survivors have, with the layout that they can have.
        """
        if not lost(error, self._world):
            raise error
        return self._recovery.recover()

    def on_recovery(self, announce: Callable[[Failure], None]) -> None:
        """Let `announce` be called on all ranks at the end of each recovery; by default rank 0 warns."""
        self._recovery.announce = announce

    def on_leaving(self, resign: Callable[[], None]) -> None:
        """Let `resign` be called on a rank that lives but has no place in the layout in which the others go on. It
        cannot communicate; afterwards the process ends with exit code 0."""
        self._recovery.resign = resign

    # -- results ------------------------------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Return loss and accuracy on the test set and on the validation rows.

        If replicas differ, the best one is evaluated, or (gossip) their average; the same holds for `predict`,
        `parameters` and `save`.
        """
        self._at_rest("evaluate")
        return self._loop.evaluator.evaluate()

    def predict(self, x: Array) -> Array:
        """Return on all ranks the network's outputs (rows, outputs) for the rows x (rows, *input shape).

        All ranks pass the same rows, any number of them. They are prepared like the training rows: bytes are scaled to
        0..1 and floating-point values are not, then `mean` and `std` apply. For cross-entropy the outputs are logits;
        `argmax(axis=1)` gives the classes. Raises DataError.
        """
        self._at_rest("predict")
        with self._world.agreement():
            split = unlabelled(x, self.setup.dataset.train, self.setup.options.dtype)
        self._world.same("number of rows to predict", str(split.rows))
        with self._loop.evaluator.network():
            return self._loop.evaluator.predict(split)

    def outputs(self, part: Part = "test") -> Array:
        """Return on all ranks the network's outputs (rows, outputs), as `predict` does, for the rows of the test set,
        or for those held back for validation: in the order of their numbers in the data set. Raises UserError where
        there are none."""
        self._at_rest("outputs")
        with self._world.agreement():
            setup = self.setup
            if not (setup.dataset.test if part == "test" else len(setup.sampler.validation_rows)):
                raise UserError(f"there are no {part} rows whose outputs could be given")
        with self._loop.evaluator.network():
            return self._loop.evaluator.outputs(part)

    def parameters(self) -> dict[str, Array]:
        """Return the whole arrays on all ranks, "<layer>/<name>": linear (inputs, units), conv2d (height, width,
        channels, filters)."""
        self._at_rest("parameters")
        with self._loop.evaluator.network():
            return self._engine.parameters(everywhere=True)

    def save(self, path: str | Path) -> None:
        """Write the network to an HDF5 file like model.h5: `/parameters/<layer>/<name>`, whole arrays. Raises
        OutputError."""
        self._at_rest("save")
        with self._world.agreement():
            file = Path(path)
        self._files.write_network(file)

    def load(self, path: str | Path) -> None:
        """Load the network from a file written by `save`, by a run with any layout, or from a checkpoint: its folder,
        or a run folder without results.

        The trainer's data set takes the numbers of the classes from the file, where both name them. Raises DataError,
        also if it has other classes; ConfigError if its rows are prepared otherwise.
        """
        self._at_rest("load")
        self.planned.setup = self._files.read_network(Path(path))

    def resume(self, path: str | Path) -> None:
        """Continue from a checkpoint (its folder step-N), or from the newest undamaged one in a run folder or its
        folder checkpoints, made with any layout and ranks.

        Raises ConfigError if it was made with other data, another network, optimizer, batch size, seed or dtype, and
        DataError for other classes or another number of rows; classes in another order are taken by their names.
        """
        self._at_rest("resume")
        self.planned.setup = self._files.read_checkpoint(Path(path))

    def take_best(self) -> int | None:
        """Make the network the best one of a training with patience (`stop_at`) and an output folder, for good; return
        the step after which it was evaluated, None where there is none. Training does not go on from there: resume."""
        self._at_rest("take_best")
        loop, before = self._loop, self._loop.step
        step = self._files.read_best()
        if step is not None and step != before:
            loop.evaluation, loop.evaluator.unified = None, True
        return step

    def summary(self) -> dict[str, Any]:
        """Return the figures of the training as in summary.json. Replicas that differ become one network, for good."""
        self._at_rest("summary")
        loop, world, train = self._loop, self._world, self.setup.config.train
        if loop.evaluation is None and loop.step:  # resumed after its last step
            loop.evaluation = loop.evaluator.evaluate()
        latest = {} if loop.evaluation is None else loop.evaluation.figures()
        final = {"test_accuracy": None, "test_loss": None, **latest, **loop.evaluator.unify()}
        chosen = ("test_accuracy", "test_loss", "average", "best_replica")
        return {
            "world_size": world.size,
            "layout": self.setup.layout_line,
            "steps": loop.step,
            "start_seconds": dict(START.seconds),
            "train_seconds": round(loop.clock.seconds, 3),
            "samples_per_second": loop.clock.samples_per_second,
            **{name: final[name] for name in chosen if name in final},
            "final_loss": loop.loss,
            "stopped_by": loop.stopped_by or ("epochs" if train.steps is None else "steps"),
            "failures": [failure.figures() for failure in self._recovery.failures],
            "data": asdict(TrainedOn.of(self.setup)),
            "exchange": self._engine.exchange_figures(),
            "device": self.setup.options.device,
            "kernels": self._engine.device.names,
            "mpi": world.library,
            "mpi_threads": world.threads,
            "host": world.host,
        }

    def trace(self) -> str | None:
        """Return on rank 0, with the setting `trace`, when each rank did what, as the JSON of a Chrome trace; else
        None."""
        self._at_rest("trace")
        places = [self.setup.place_line(rank) for rank in range(self.size)]
        trace = self._engine.pipeline.trace
        return None if trace is None else trace.gather(self._world, places)

    # -- the end ------------------------------------------------------------------------------------------------------

    @NOW.during("the end")
    def close(self) -> None:
        """Free all MPI objects. All ranks call; a second call does nothing."""
        atexit.unregister(self._end_of_script)
        for run in [each() for each in self._runs]:
            if run is not None:
                run.close()
        closers, self._closers = self._closers, []
        for close in closers:
            close()
        self._raise_missed()

    def abandon(self) -> None:
        """Forget the training, after an error or as ranks are lost: free nothing that others have to free, too, give up
        a checkpoint that is being written, and let other runs use the folder."""
        atexit.unregister(self._end_of_script)
        self._closers.clear()
        if hasattr(self, "_files"):
            self._forget_state()
            self._files.abandon()
            self._files.close()

    def _forget_state(self) -> None:
        """Let the watchdog save nothing of what is freed now."""
        watchdog = self._world.watchdog
        if watchdog is not None and watchdog.emergency is self._files.emergency:
            watchdog.emergency = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not agreed(error, self._world):
            self._fail()
            if self.size > 1:
                end_all(self._world, error)
        try:
            self.close()
        except NetTorrentError:
            if error is None:
                raise

    def _end_of_script(self) -> None:
        """Handle the interpreter's exit with trainers that are still open."""
        abort_after_error()
        if getattr(sys, "last_type", None) is not None and hasattr(self, "_files"):
            self._fail()
        self.close()

    def _fail(self) -> None:
        """Give up what is under way, after an error that this rank has raised alone."""
        self._loop.abandoned = True
        self._files.abandon()

    def _open(self, what: str) -> None:
        if not self._closers:
            raise UserError(f"{what}() of a trainer that is closed")
        self._raise_missed()

    def _raise_missed(self) -> None:
        """Raise the error that ended the loop over train() after the caller had left it."""
        missed = self._loop.missed if hasattr(self, "_loop") else None
        if missed is not None:
            self._loop.missed = None
            raise missed

    def _at_rest(self, what: str) -> None:
        self._open(what)
        if not self._loop.at_rest:
            raise UserError(
                f"{what}() inside the loop over train(): wait for a record with at_rest, as after each epoch"
            )
