"""The median rule is Optuna's, and trial.json is read as it was written."""

from __future__ import annotations

import random

import pytest

from nettorrent_mpi.config.search_file import MedianRule
from nettorrent_mpi.tune.trials import COMPLETE, FAILED, PRUNED, Trial, prunes


def trial(number: int, state: str, values: list[float]) -> Trial:
    told = tuple((float(epoch), value) for epoch, value in enumerate(values, 1))
    last = values[-1] if state == COMPLETE else None
    return Trial(number, {}, "job", 0, 1, 1, 0.0, state, last, accuracies=told)


def test_a_trial_is_read_as_it_was_written() -> None:
    made = trial(3, COMPLETE, [0.25, 0.5])
    assert Trial.read(made.text().encode()) == Trial(**{**vars(made), "accuracies": list(made.accuracies)})
    assert Trial.read(b'{"number": 1}') is None
    assert Trial.read(b"[]") is None
    assert Trial.read(b"\xff") is None


def test_the_rule_by_hand() -> None:
    others = [trial(n, COMPLETE, [0.1 * n, 0.2 * n]) for n in range(1, 5)]
    rule = MedianRule(startup_trials=4, warmup_epochs=1)
    assert not prunes(rule, [(1.0, 0.0)], others)  # in its first epoch
    assert prunes(rule, [(1.0, 0.0), (2.0, 0.49)], others)  # the median is 0.5
    assert not prunes(rule, [(1.0, 0.6), (2.0, 0.1)], others)  # its best counts
    assert not prunes(rule, [(1.0, 0.0), (2.0, 0.49)], others[1:])  # too few
    assert not prunes(rule, [(3.0, 0.0)], others)  # nobody else has come so far
    assert not prunes(rule, [(2.0, 0.0)], [*others[1:], trial(9, FAILED, [0.9, 0.9]), trial(8, PRUNED, [0.9, 0.9])])


def test_the_rule_is_that_of_optuna() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {COMPLETE: optuna.trial.TrialState.COMPLETE, PRUNED: optuna.trial.TrialState.PRUNED}
    states[FAILED] = optuna.trial.TrialState.FAIL
    chance, decided = random.Random(3), []
    for _ in range(150):
        startup, warmup = chance.randint(1, 4), chance.randint(0, 2)
        others = []
        for number in range(chance.randint(0, 7)):
            state = chance.choice([COMPLETE, COMPLETE, COMPLETE, PRUNED, FAILED])
            others.append(trial(number, state, [chance.random() for _ in range(chance.randint(1, 4))]))
        values = [chance.random() for _ in range(chance.randint(1, 4))]
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(startup, warmup))
        for other in others:
            steps = {step: value for step, (_, value) in enumerate(other.accuracies)}
            made = optuna.trial.create_trial(
                state=states[other.state], value=other.accuracy, intermediate_values=steps, params={}, distributions={}
            )
            study.add_trial(made)
        asked = study.ask()
        for step, value in enumerate(values):
            asked.report(value, step)
        own = [(float(epoch), value) for epoch, value in enumerate(values, 1)]
        decided.append(prunes(MedianRule(startup_trials=startup, warmup_epochs=warmup), own, others))
        assert decided[-1] == asked.should_prune()
    assert {True, False} == set(decided)
