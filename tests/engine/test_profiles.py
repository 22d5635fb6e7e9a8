from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.engine.layer_times import Company, LayerTrial, Sample, fitted, least_errors, measure_layers
from nettorrent_mpi.engine.layout import lay_out, predicted
from nettorrent_mpi.engine.measured_machine import own_costs, serial_trials, solved, trials
from nettorrent_mpi.engine.profiles import NONE, Profiles, key_of, own_file, read_profiles, write_profile
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.performance import LayerCost, LayerTimes, Link, Machine
from nettorrent_mpi.plan.sizes import part_of


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration.load("configs/digits.yaml")


@pytest.fixture(scope="module")
def network(config: Config) -> Network:
    return set_up(config, 1, planning=True).network


@pytest.fixture
def machine(network: Network) -> Machine:
    """A machine with numbers of its own for everything."""
    cost = LayerCost(1e-5, 2e-7, 3e-7, 4e-6)
    layers = {facts.name: LayerTimes(cost, cost, 1e-6) for facts in network.facts}
    alone = Machine(layers=layers, call=1e-5, row=1e-6, step=3e-5, update=1e-9)
    return replace(alone, alone=alone, fence=2e-5, collective=3e-5, latency=4e-6, round=1e-4, link=Link(1e-4, 1e7))


def test_a_profile_is_read_as_it_was_written(
    config: Config, network: Network, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_profiles().machine(config, network) == Machine()
    assert str(own_file()).startswith(str(tmp_path))
    write_profile(own_file(), "another", Machine(), {})
    write_profile(own_file(), key_of(config, network), machine, {"ranks": 2})
    known = read_profiles()
    assert known.machine(config, network) == machine
    assert set(known.machines) == {"another", key_of(config, network)}
    setup = set_up(config, 2, planning=True, known=known)
    assert setup.machine == machine
    # another mini-batch or layout, but not another network, optimizer or type
    same = [replace(config, layout="auto"), replace(config, train=replace(config.train, batch_size=64))]
    assert [known.machine(each, network) for each in same] == [machine] * 2
    other = configuration.load("configs/digits.yaml", ["train.optimizer=sgd"])
    wide = configuration.load("configs/digits.yaml", ["dtype=float64"])
    assert known.machine(other, network) == Machine()
    assert known.machine(wide, network) == Machine(itemsize=8)
    assert read_profiles(NONE) == Profiles()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"networks": []}', '{"networks": {"a": {}}}', '{"networks": {"a": null}}', "\xff"],
)
def test_a_damaged_profile_is_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own_file().parent.mkdir(parents=True)
    own_file().write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="is no profile; times are predicted by constants"):
        assert read_profiles() == Profiles()
    with pytest.raises(DataError, match="is no profile: write it anew"):
        read_profiles(str(own_file()))


def test_figures_of_a_profile_are_checked(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write_profile(file, "a", machine, {})
    content = json.loads(file.read_text())
    for value in (-1.0, "1", None, True, 1e400):
        content["networks"]["a"]["alone"]["layers"]["conv2d1"]["forward"]["row"] = value
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is no profile"):
            read_profiles(str(file))
    with pytest.raises(DataError, match=r"is missing; `nettorrent profile --output FILE` writes it"):
        read_profiles(str(tmp_path / "none.json"))


def test_an_unreadable_cache_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own_file().mkdir(parents=True)
    with pytest.warns(UserWarning, match="Is a directory; times are predicted by constants"):
        assert read_profiles() == Profiles()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_profiles() == Profiles()


def test_costs_that_made_the_times_are_found(config: Config, network: Network, machine: Machine) -> None:
    config = replace(config, train=replace(config.train, batch_size=32))
    bare = replace(machine, call=0.0, row=0.0, step=0.0, fence=0.0, collective=0.0, latency=0.0, round=0.0, alone=None)
    right = replace(bare, call=1e-5, row=1e-6, step=3e-5)

    def seconds(config: Config, ranks: int, machine: Machine) -> float:
        return predicted(config, network, lay_out(config, network, ranks), machine).seconds

    measured = {each: seconds(each, 1, right) for each in serial_trials(config, network)}
    assert len(measured) == 3
    found = own_costs(bare, network, measured)
    assert (found.call, found.row, found.step) == pytest.approx((1e-5, 1e-6, 3e-5))
    half = {each: seconds(each, 1, bare) / 2 for each in measured}
    quick = own_costs(bare, network, half)
    assert [seconds(each, 1, quick) for each in half] == pytest.approx(list(half.values())), "layers were disturbed"
    right = replace(right, fence=2e-5, collective=3e-5, latency=4e-5, round=1e-4)
    for trial in trials(config, network):
        found = solved(found, trial.name, trial.config, network, seconds(trial.config, 2, right))
    names = ("fence", "collective", "latency", "round")
    assert [getattr(found, name) for name in names] == pytest.approx([getattr(right, name) for name in names], rel=1e-3)
    first = trials(config, network)[0]
    assert solved(bare, first.name, first.config, network, 0.0).fence == 0, "quicker than it can be"


def test_no_cost_is_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    assert least_errors(rows, [3.0, 5.0, 9.0]) == pytest.approx([1, 2])
    assert least_errors(rows, [1.0, 2.1, 4.3])[0] == 0
    assert least_errors(rows, [-1.0, -2.0, -3.0], of=[1, 1, 1]) == [0, 0]


def test_layers_are_measured_and_fitted(config: Config, network: Network) -> None:
    options = set_up(config, 1, planning=True).options
    sample = measure_layers(network, options, Company(), 0.01, cols=2, rows=4)
    assert all(
        len(times) == 4 and min(times) > 0
        for times in (sample.forward, sample.backward, sample.accumulated, sample.weights)
    )
    trial = LayerTrial(network, options, 4, 4)
    assert [len(times) for times in trial.run(accumulate=True)[:2]] == [4, 4]
    # what two costs make is found again
    sizes = [(rows, cols) for rows in (8, 16, 32) for cols in (1, 2, 4)]
    samples = []
    for rows, cols in sizes:
        forward = [1e-5 + rows * (1e-7 + 2e-6 * part_of(f.units, cols)) for f in network.facts]
        backward = [2e-5 + 3e-6 * part_of(f.units, cols) + rows * 1e-7 for f in network.facts]
        samples.append(
            Sample(rows, cols, forward, backward, [s + 1e-6 for s in backward], [s / 2 for s in backward], 0.0)
        )
    found = fitted(network, samples)["conv2d2"]
    assert found.forward.seconds(64, 0.5) == pytest.approx(1e-5 + 64 * (1e-7 + 1e-6))
    assert found.backward.seconds(1, 0.25) == pytest.approx(2e-5 + 0.75e-6 + 1e-7)
