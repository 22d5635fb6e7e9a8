"""The training loop runs step after step and yields records of its progress. It prints nothing and writes no files
itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.config.sections import Train
from nettorrent_mpi.engine.blame import check_finite
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluation, Evaluator
from nettorrent_mpi.engine.patience import Patience
from nettorrent_mpi.engine.rank_seconds import line
from nettorrent_mpi.engine.record import Record
from nettorrent_mpi.engine.reports import Report, Reports
from nettorrent_mpi.engine.saving import Saving
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.engine.stopping import Stopping
from nettorrent_mpi.engine.usage import Clock
from nettorrent_mpi.exchange.base import next_multiple
from nettorrent_mpi.nn.rates import make_rate
from nettorrent_mpi.plan.errors import NetTorrentError, UserError
from nettorrent_mpi.plan.scores import Scores

if TYPE_CHECKING:
    from nettorrent_mpi.engine.safeguard import Safeguard

SIGNAL, ACCURACY, PATIENCE = "signal", "accuracy", "patience"


class TrainingLoop:
    """A TrainingLoop trains an engine's network. Every rank makes one and calls the same methods.

    Ranks train on without waiting for each other until they come to rest: to evaluate, save or decide. Reports in
    between are nonblocking sums.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Train,
        saving: Saving,
        signals: Signals | None = None,
        copy_every: int | None = None,
    ):
        """`copy_every` is the number of steps between copies of the state, where ranks may be lost; None: no copies."""
        self._engine, self._settings, self._saving, self._signals = engine, settings, saving, signals
        self.epoch_steps = engine.sampler.steps_per_epoch
        self.step = self.samples = 0  # so far, those before a resume included
        self.loss: float | None = None  # the latest mean training loss
        self.accuracy: float | None = None  # the one that has ended the training
        stop = settings.stop_at
        self.patience: Patience | None = None
        if stop is not None and stop.patience is not None:
            self.patience = Patience(stop.patience, by_loss=stop.metric == "loss")
        self.evaluation: Evaluation | None  # the latest one
        self.stopped_by: str | None = None  # SIGNAL, ACCURACY or PATIENCE where one of them ended the last training
        self.at_rest = True
        self.abandoned = False  # an error has ended it: no further communication
        self.missed: NetTorrentError | None = None  # raised on all ranks after this one's caller had left the loop
        self.clock = Clock(engine.settle)
        self._copy_every = copy_every
        self._began = time.perf_counter()
        self.left = False  # the caller has left the loop over the latest training
        self._diverged = False
        self._run = 0  # number of the latest training
        self.attach()

    def attach(self) -> None:
        """Make what belongs to the engine's present wiring. All ranks call, at rest."""
        engine, self.at_rest = self._engine, True
        self.clock.stop()
        self.evaluator, self.evaluation = Evaluator(engine), None
        bound = engine.wiring.channel(engine.bound)
        self._stopping = Stopping(engine.world, bound, self._signals, apart=not engine.plan.exact)
        self._reports: Reports[Record | None] = Reports(engine)
        self.guard: Safeguard | None = None
        if survivable():
            from nettorrent_mpi.engine.safeguard import Safeguard

            self.guard = Safeguard(engine, self._copy_every)

    def abandon(self) -> None:
        """Give up what is in flight, after the world was revoked because ranks are lost."""
        self._stopping.abandon()
        self._reports.abandon()

    @property
    def time(self) -> float:
        """Return the seconds since the training began, those before a resume included."""
        return time.perf_counter() - self._began

    def train(self, until: int, horizon: int) -> Iterator[Record]:
        """Train until `until` steps are complete, the wanted accuracy is reached or a rank is asked to stop; yield the
        records. The learning-rate schedule spans `horizon` steps.

        If the caller leaves the loop early, the ranks train on until all of them are at rest after the same step.
        Raises NonFiniteError on all ranks if the training diverges.
        """
        if not self.at_rest:
            raise UserError("another loop over train() has not come to its end")
        if until <= self.step:
            return
        settings, engine, clock = self._settings, self._engine, self.clock
        stopping, saving, reports, exchange = self._stopping, self._saving, self._reports, engine.exchange
        guard = self.guard
        lr = settings.optimizer.options()["lr"]
        rates = make_rate(settings.schedule, lr, horizon, self.epoch_steps, exchange.rate_scale)
        stop: int | None = None
        reported = False
        run = self._begin()
        try:
            while self.step < until:
                clock.go_on()
                self.at_rest, n = False, self.step
                rest = self._next_rest(n, until) if stop is None else stop
                rate = rates(n)
                work = engine.prepare(n, rate, rest - n)
                engine.pipeline.run(work)
                done = self.step = n + 1
                self.samples += work.rows
                clock.step(work.rows, measuring=exchange.measuring)
                saving.poll()
                if guard is not None:
                    guard.after(done)
                epochs = done // self.epoch_steps if done % self.epoch_steps == 0 else 0
                ask = reported and done < rest  # a report may have arrived one step after it was started
                last, tells = done == until, bool(epochs) or done % settings.report_every == 0
                figures = tells or last or (done == rest and exchange.next_rest(n) == done)
                reported = figures or done == rest or stopping.due(done)
                if reported:
                    asks = stopping.asked or saving.overdue
                    record = self._record(rate) if figures else None
                    reports.start(record, rest=asks, stop=stopping.asked, left=self.left, figures=figures)
                if done == 2:
                    clock.settle()
                    stopping.pace(clock.seconds_per_step)
                try:
                    yield from self._arrived(wait=done == rest, to_request=True)
                except GeneratorExit:
                    if self._leave():
                        return
                know = stopping.all_know(ask=ask) or (done == rest and stopping.heard)
                if know and stop is None:  # others may wait at an earlier rest
                    stop = min(rest, stopping.last_step(done + 1 + engine.schedule.ahead))
                if done < rest:
                    continue
                try:
                    yield from self._arrived(wait=True)
                except GeneratorExit:
                    if self._leave():
                        return
                clock.stop()
                self.at_rest = True
                *_, report = reports.ready(wait=True)
                if self._diverged or report.diverged:
                    check_finite(engine)
                record = None if report.tag is None else self._completed(report)
                reached = self._reached(exchange.at_rest(done, self.evaluator.compare, report.distance))
                if report.left:
                    break
                known = reached
                due = report.rest or last or reached or saving.due(done)
                evaluates = record and (last or reached or (epochs and epochs % settings.evaluate_every == 0))
                judges = evaluates and self.patience is not None  # which a checkpoint has to know of
                if due and not judges:  # first, because an evaluation may fail
                    saving.save(needed=report.stop and not last)
                if record and evaluates:
                    self.evaluation = found = self.evaluator.evaluate()
                    record = replace(record, evaluated=True, best_replica=found.best_replica, **found.figures())
                    reached = reached or self._reached(found.deciding)
                    reached = self._judge(found.deciding) or reached
                if judges and (due or reached):
                    saving.save(needed=report.stop and not last)
                    known = True
                if record and (last or reached or tells):
                    try:
                        yield replace(record, at_rest=True)
                    except GeneratorExit:
                        if self.abandoned or run != self._run:
                            return
                        self.left = True
                if reached and not known:
                    saving.save(needed=False)
                if reached or (report.stop and not last):
                    self.stopped_by = SIGNAL if report.stop and not last else self._reason()
                    break
                if stopping.pace(clock.seconds_per_step, left=self.left):
                    break
                stop = None
                stopping.begin()
            saving.finish()
            if guard is not None:
                guard.refresh(self.step)
        except NetTorrentError as error:
            saving.finish(error)
            if not self.left:
                raise
            self.missed = error  # the caller has left, and Python would print the error and forget it
        self.at_rest = True

    def resume(self, step: int, samples: int, seconds: float, loss: float | None, accuracy: float | None) -> None:
        """Continue from the steps, samples and seconds of an earlier training, with its latest training loss and the
        accuracy that has ended it, if any."""
        self.step, self.samples, self.loss, self.accuracy = step, samples, loss, accuracy
        if self.patience is not None:
            self.patience.forget_after(step)
        self.stopped_by = None if accuracy is None else ACCURACY
        self._began = min(self._began, time.perf_counter() - seconds)

    def finished(self, until: int) -> bool:
        """Whether nothing is left to train: `until` steps are complete, or the accuracy that ends the training is
        reached."""
        stop = self._settings.stop_at
        if self.step >= until or (self.patience is not None and self.patience.exhausted):
            return True
        return stop is not None and stop.accuracy is not None and (self.accuracy or 0.0) >= stop.accuracy

    def close(self) -> None:
        """Free the communicators. All ranks call, at rest."""
        list(self._reports.ready(wait=True))
        self._reports.close()
        if self.guard is not None:
            self.guard.close()

    def _begin(self) -> int:
        """Begin a training and return its number."""
        self.stopped_by, self.at_rest, self.left, self._diverged = None, False, False, False
        self.accuracy = None
        self.evaluator.unified = self._engine.exchange.count == 1
        self._stopping.begin()
        self._saving.begin()
        if self.guard is not None:
            self.guard.refresh(self.step)
        self._run += 1
        return self._run

    def _leave(self) -> bool:
        """Ask all ranks to come to rest, because the caller takes no more records; return whether this rank already
        is."""
        if self.abandoned:
            return True
        self.left = True
        self._stopping.hear(True)
        if self._engine.world.size > 1:
            return False
        list(self._reports.ready(wait=True))
        self.clock.stop()
        self._saving.finish()
        self.at_rest = True
        return True

    def _next_rest(self, n: int, until: int) -> int:
        """Return the number of steps after which the ranks next rest, step n being the next to run."""
        found = [until, next_multiple(n, self._settings.evaluate_every * self.epoch_steps), *self._saving.rests(n)]
        due = self._engine.exchange.next_rest(n)
        return min(found if due is None else [*found, due])

    def _arrived(self, *, wait: bool, to_request: bool = False) -> Iterator[Record]:
        """Yield the records that the ranks' reports complete.

        `wait`: for all reports but the last, whose record follows at rest. `to_request`: stop at a report by which some
        rank asks for a rest, because ranks that have heard of it may start no more before all know.
        """
        for report in self._reports.ready(wait=wait, but=1):
            asked = report.rest or report.diverged
            self._diverged = self._diverged or report.diverged
            self._stopping.hear(asked)
            record = None if report.tag is None or report.diverged else self._completed(report)
            if record is not None and not self.left:
                yield record
            if to_request and asked:
                break

    def _record(self, rate: float) -> Record:
        """Return this step's record, before the other ranks' figures are known. Its times are those of complete steps:
        the report's figures wait for them, too."""
        self.clock.settle()
        epoch, seconds = round(self.step / self.epoch_steps, 4), round(self.time, 3)
        return Record(self.step, epoch, self.samples, seconds, 0.0, rate, self.clock.samples_per_second)

    def _completed(self, report: Report[Record | None]) -> Record:
        self.loss = report.training.loss
        self.evaluator.losses = report.replicas
        assert report.tag is not None
        seconds = line(report.seconds, self._engine.topology)
        return replace(report.tag, train_loss=self.loss, consensus_distance=report.distance, ranks=seconds)

    def _reached(self, scores: Scores | None) -> bool:
        """Whether the accuracy that ends the training is reached."""
        stop = self._settings.stop_at
        if stop is None or stop.accuracy is None or scores is None or (scores.accuracy or 0.0) < stop.accuracy:
            return False
        self.accuracy = scores.accuracy
        return True

    def _judge(self, scores: Scores | None) -> bool:
        """Have the network kept if it is the best so far; return whether the patience is exhausted."""
        if self.patience is None or scores is None:
            return False
        if self.patience.see(self.step, scores):
            self._saving.keep_best(self.step)
        return self.patience.exhausted

    def _reason(self) -> str:
        """Say why a training ends before its last step, if no signal has stopped it."""
        return ACCURACY if self.accuracy is not None or self.patience is None else PATIENCE
