"""Samplers choose the point of a trial by its number: all points of a grid, points drawn at random, or those that
Optuna's tree-structured Parzen estimator (TPE; Bergstra et al., 2011) expects most of.

Grid and random depend on the number and the seed alone, so a study tries the same points on any number of groups. TPE
depends on the trials that have ended before, too. Only this module loads Optuna (the extra `tune`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

from nettorrent_mpi.config.search_file import Search
from nettorrent_mpi.config.search_space import Choice, Label, Parameter
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.seeds import key
from nettorrent_mpi.tune.trials import COMPLETE, PRUNED, RUNNING, Trial


def point(search: Search, number: int, told: Sequence[Trial]) -> dict[str, Label]:
    """Return the point of a trial; `told` are the others so far."""
    sections = search.sections
    if sections.sampler == "grid":
        return search.grid_point(number)
    if sections.sampler == "random":
        chances = {name: random.Random(key(sections.seed, "search", number, name)) for name in search.parameters}
        return {name: parameter.draw(chances[name]) for name, parameter in search.parameters.items()}
    return _estimated(search.parameters, key(sections.seed, "search", number) % 2**32, told)


def check(search: Search) -> None:
    """Raise a ConfigError where the sampler needs a package that is not there."""
    if search.sections.sampler == "tpe":
        _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        text = "sampler: tpe needs Optuna: pip install 'nettorrent_mpi[tune]', or choose grid or random"
        raise ConfigError(text) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _estimated(parameters: dict[str, Parameter], seed: int, told: Sequence[Trial]) -> dict[str, Label]:
    """Ask Optuna's TPE, which is told all trials: those that run count as bad ones (a constant liar), so that groups do
    not try the same point at the same time."""
    optuna = _optuna()
    spaces = {name: _distribution(optuna.distributions, parameter) for name, parameter in parameters.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is experimental in older versions
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        states = optuna.trial.TrialState
        kinds = {COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, RUNNING: states.RUNNING}
        for trial in sorted(told, key=lambda each: each.number):
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
        asked = study.ask(spaces).params
    return {
        name: each.labels[asked[name]] if isinstance(each, Choice) else asked[name] for name, each in parameters.items()
    }


def _distribution(distributions: Any, parameter: Parameter) -> Any:
    """Return a parameter as Optuna has it; a choice by the positions of its labels, which may be any."""
    if isinstance(parameter, Choice):
        return distributions.CategoricalDistribution(tuple(range(len(parameter.labels))))
    if parameter.whole:
        low, high = int(parameter.low), int(parameter.top)
        return distributions.IntDistribution(low, high, log=parameter.log, step=int(parameter.step or 1))
    return distributions.FloatDistribution(parameter.low, parameter.top, log=parameter.log, step=parameter.step)


def _index(parameter: Parameter, label: Label) -> Label:
    if not isinstance(parameter, Choice):
        return label
    return [(type(each), each) for each in parameter.labels].index((type(label), label))
