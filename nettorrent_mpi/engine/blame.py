"""A value that is not finite is blamed on the data, or on the training."""

from __future__ import annotations

from nettorrent_mpi.data.rows import Wrong
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan.errors import DataError, NetTorrentError, NonFiniteError


def check_finite(engine: Engine, evaluated: Batches | None = None, *, finite: bool = False) -> None:
    """Raise an error on all ranks if one of them has seen a value that is not finite, in training or in the evaluation
    of `evaluated`, or has such weights (unless it knows that those it owns are `finite`): a DataError where the rows
    hold such a value, otherwise a NonFiniteError, which names the earliest step and its first layer. All ranks call, at
    rest."""
    everyone, place = engine.wiring.everyone, engine.place
    mine = engine.pipeline.divergence.found() or (None if finite else _wrong_weights(engine))
    found = everyone.gather_objects(None if mine is None else (mine[0], place.stage, mine[1]))
    engine.pipeline.divergence.forget()
    seen = [(*each, rank) for rank, each in enumerate(found) if each is not None]
    if not seen:
        return
    own = [step for step, _, _, rank in seen if engine.topology.place(rank).replica == place.replica]
    wrong = [each for each in everyone.gather_objects(_wrong_row(engine, evaluated, own)) if each is not None]
    error: NetTorrentError
    if wrong:
        step, row = min(wrong)
        name = "x_test" if engine.test is not None and evaluated is engine.test else "x"
        when = f"the evaluation after step {step} needs" if evaluated else f"step {step + 1} trained on"
        text = (
            f"{name}: {row.describe()}, which {when}: correct it, or leave the row out (the training is not to blame)"
        )
        error = DataError(text, file=engine.dataset.file)
    else:
        step, _, layer, rank = min(seen)
        step = engine.steps if evaluated else step + 1
        error = NonFiniteError(step=step, layer=layer, rank=rank, evaluated=evaluated is not None)
    error.agreed = engine.world.members
    raise error


def _wrong_weights(engine: Engine) -> tuple[int, str] | None:
    """Return the latest step and the first layer of this rank whose weights are not finite after it, or None."""
    finite = engine.device.ops.all_finite
    for layer, params in engine.layers.with_params(engine.state.params):
        if not all(finite(array) for array in params.values()):
            return engine.steps - 1, layer.name
    return None


def _wrong_row(engine: Engine, evaluated: Batches | None, seen: list[int]) -> tuple[int, Wrong] | None:
    """Find a value that is not finite in this rank's rows: those of the evaluation, or of the steps that can have led
    to what its replica has `seen`. Return the step and the value."""
    dtype = engine.state.dtype
    if evaluated is not None:
        wrong = evaluated.first_nonfinite(dtype)
        return None if wrong is None else (engine.steps, wrong)
    last = min(seen, default=-1)
    for step in range(max(last - 1 - engine.schedule.ahead, 0), last + 1):
        engine.train.begin_step(step, engine.options.micro_batches)
        wrong = engine.train.first_nonfinite(dtype)
        if wrong is not None:
            return step, wrong
    return None
