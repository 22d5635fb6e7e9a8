"""Optuna's estimates from the trials of a study: the point to try next, and which parameters matter. Both compare the
distribution of a parameter's values in good trials with that in others (Parzen estimators). Only this module loads
Optuna (the extra `tune`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nettorrent_mpi.config.search_space import Choice, Label, Parameter
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.tune.trials import COMPLETE, PRUNED, RUNNING, Trial

INSTALL = "pip install 'nettorrent_mpi[tune]'"
LEAST = 10  # complete trials: five in either half


def check() -> None:
    """Raise a ConfigError where Optuna is not installed."""
    _optuna()


def tells_importances() -> bool:
    """Whether there is an Optuna that has `importances`: version 5 or newer."""
    try:
        return int(_optuna().__version__.partition(".")[0]) >= 5
    except ConfigError:
        return False


def next_point(parameters: Mapping[str, Parameter], seed: int, told: Sequence[Trial]) -> dict[str, Label]:
    """Ask Optuna's tree-structured Parzen estimator (TPE; Bergstra et al., 2011), which is told all trials: those that
    run count as bad ones (a constant liar), so that groups do not try the same point at the same time."""
    optuna = _optuna()
    with _silence():  # constant_liar is experimental in older versions
        study = _study(parameters, told, optuna.samplers.TPESampler(seed=seed, constant_liar=True))
        asked = study.ask(_distributions(parameters)).params
    return {
        name: each.labels[asked[name]] if isinstance(each, Choice) else asked[name] for name, each in parameters.items()
    }


def importances(parameters: Mapping[str, Parameter], trials: Sequence[Trial]) -> dict[str, float] | None:
    """Return how much each parameter matters for a complete trial to be among the better half, as shares that sum to 1,
    or are all 0 if none matters (PED-ANOVA; Watanabe et al., 2023); None with fewer than LEAST complete trials.

    It measures how far the parameter's distribution in the better half is from that in all trials, whatever sampler has
    drawn them. Where an Optuna `tells_importances`.
    """
    optuna = _optuna()
    complete = [trial for trial in trials if trial.state == COMPLETE]
    if len(complete) < LEAST:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    with _silence():  # of halves that cannot be told apart
        found = evaluator.evaluate(_study(parameters, complete), list(parameters))
    whole = sum(found.values())
    return {name: found[name] / whole if whole else 0.0 for name in parameters}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(f"sampler: tpe needs Optuna: {INSTALL}, or choose grid or random") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _study(parameters: Mapping[str, Parameter], trials: Sequence[Trial], sampler: Any = None) -> Any:
    """Return a study of Optuna's, in memory, with these trials but those that have failed."""
    optuna = _optuna()
    spaces, states = _distributions(parameters), optuna.trial.TrialState
    study = optuna.create_study(direction="maximize", sampler=sampler)
    kinds = {COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, RUNNING: states.RUNNING}
    for trial in sorted(trials, key=lambda each: each.number):
        if trial.state not in kinds:
            continue
        made = optuna.trial.create_trial(
            state=kinds[trial.state],
            value=trial.accuracy if trial.state == COMPLETE else None,
            params={name: _index(parameters[name], label) for name, label in trial.point.items()},
            distributions=spaces,
            intermediate_values={number: value for number, (_, value) in enumerate(trial.accuracies)},
        )
        study.add_trial(made)
    return study


def _distributions(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the parameters as Optuna has them; a choice by the positions of its labels, which may be any."""
    kinds, found = _optuna().distributions, {}
    for name, parameter in parameters.items():
        if isinstance(parameter, Choice):
            found[name] = kinds.CategoricalDistribution(tuple(range(len(parameter.labels))))
        elif parameter.whole:
            low, high = int(parameter.low), int(parameter.top)
            found[name] = kinds.IntDistribution(low, high, log=parameter.log, step=int(parameter.step or 1))
        else:
            found[name] = kinds.FloatDistribution(parameter.low, parameter.top, log=parameter.log, step=parameter.step)
    return found


def _index(parameter: Parameter, label: Label) -> Label:
    if not isinstance(parameter, Choice):
        return label
    return [(type(each), each) for each in parameter.labels].index((type(label), label))
