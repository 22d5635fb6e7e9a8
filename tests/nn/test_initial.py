"""Initial values: their spread, and that they depend on names and the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Features, Parameter
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.nn.layers.sequence import Sequence, named
from nettorrent_mpi.plan import specs as s

VARIANCES = {"he": 2 / 300, "glorot": 2 / 800, "lecun": 1 / 300}


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("scheme", VARIANCES)
def test_spread(scheme, distribution):
    value = initial_value(Parameter("weight", (300, 500), f"{scheme}_{distribution}", fans=(300, 500)), 1, "linear1")
    assert value.dtype == np.float64
    assert abs(value.var() / VARIANCES[scheme] - 1) < 0.02
    assert abs(value.mean()) < 4 * np.sqrt(VARIANCES[scheme] / value.size)
    bound = np.sqrt(3 * VARIANCES[scheme])
    assert (abs(value).max() <= bound) == (distribution == "uniform")
    if distribution == "uniform":
        assert abs(value).max() > 0.999 * bound


def test_constants():
    np.testing.assert_array_equal(initial_value(Parameter("bias", (3,)), 1, "linear1"), np.zeros(3))
    np.testing.assert_array_equal(initial_value(Parameter("weight", (3,), "ones"), 1, "norm1"), np.ones(3))


def test_values_depend_on_seed_and_names_alone():
    parameter = Parameter("weight", (4, 5), "he_normal", fans=(4, 5))
    first = initial_value(parameter, 1, "linear1")
    np.testing.assert_array_equal(first, initial_value(parameter, 1, "linear1"))
    assert not np.array_equal(first, initial_value(parameter, 2, "linear1"))
    assert not np.array_equal(first, initial_value(parameter, 1, "linear2"))


def initials(layers, shape=(6, 6, 3)):
    return {
        key: parameter.initial
        for key, parameter in Sequence(named(layers), Site("", Features.whole(shape))).parameters
        if key.endswith("weight")
    }


def test_auto_looks_for_the_activation_that_follows():
    found = initials(
        [
            s.Conv2d(4, activation="relu"),
            s.Conv2d(4, 1),
            s.BatchNorm(),
            s.Gelu(),
            s.Residual(layers=(s.Conv2d(4, 1, activation="tanh"), s.Conv2d(4, 1))),
            s.LeakyRelu(),
            s.Flatten(),
            s.Linear(5, initial="lecun_uniform", activation="relu"),
            s.Linear(5),
            s.Linear(5, activation="sigmoid"),
        ]
    )
    assert list(found.values()) == [
        "he_normal",
        "he_normal",
        "ones",
        "glorot_uniform",
        "he_normal",
        "lecun_uniform",
        "glorot_uniform",
        "glorot_uniform",
    ]


def test_fans():
    parameters = dict(
        Sequence(named([s.Conv2d(4, (3, 2)), s.Flatten(), s.Linear(7)]), Site("", Features.whole((6, 6, 3)))).parameters
    )
    assert parameters["conv2d1/weight"].fans == (18, 24)
    assert parameters["linear1/weight"].fans == (80, 7)
