"""A network keeps a description of the data it was trained on, which is compared with the data that it meets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.trained_on import ATTRIBUTE, TrainedOn, fit

FILE = Path("run/model.h5")
LABELS = np.array([2, 0, 1, 2, 1])


def setup(classes: Any = ("bee", "cat", "dog"), rows: int = 5, **how: Any) -> Setup:
    x = np.zeros((rows, 2))
    data = nt.from_arrays(x, LABELS[:rows], x, LABELS[:rows], classes=classes, **how)
    return nt.plan([nt.Linear(3)], data, batch_size=2).setup


def attributes(of: Setup) -> Mapping[str, str]:
    return {ATTRIBUTE: TrainedOn.of(of).text()}


def test_it_is_read_as_it_was_written() -> None:
    for each in (setup(), setup(None), setup(mean=0.1, std=[0.5, 0.25])):
        assert TrainedOn.read(attributes(each), "") == TrainedOn.of(each)
    assert TrainedOn.of(setup(mean=0.1, std=[0.5, 0.25])) == TrainedOn(
        name="arrays",
        rows=5,
        classes=3,
        class_names=("bee", "cat", "dog"),
        mean=(0.1,),
        std=(0.5, 0.25),
        transposed=False,
        shape=(2,),
        unit=None,
    )


def test_bytes_of_another_meaning_are_refused() -> None:
    x = np.zeros((5, 8, 8, 1), np.uint8)
    layers: list[nt.LayerSpec] = [nt.Flatten(), nt.Linear(10)]
    bytes_of_255 = nt.plan(layers, nt.from_arrays(x, LABELS, classes=tuple("0123456789")), batch_size=2).setup
    assert TrainedOn.of(bytes_of_255).unit == pytest.approx(1 / 255)
    digits = nt.plan(nt.load_config()).setup
    assert TrainedOn.of(digits).unit == 1 / 16
    with pytest.raises(nt.ConfigError, match=r"data\.name: its bytes are multiplied by 0\.00392157, .* by 0\.0625; "):
        fit(bytes_of_255, attributes(digits), FILE)
    floats = nt.plan(layers, nt.from_arrays(x / 16, LABELS, classes=tuple("0123456789")), batch_size=2).setup
    assert fit(floats, attributes(digits), FILE)[1] is None


HUGE = TrainedOn.of(setup()).text().replace('"mean": [0.0]', f'"mean": [{10**400}]')


@pytest.mark.parametrize("given", [{}, *({ATTRIBUTE: text} for text in ("{", "[]", "{}", 3, HUGE))])
def test_a_file_that_does_not_say_it(given: dict[str, Any]) -> None:
    with pytest.raises(nt.DataError, match=r"run/model\.h5: does not say what it was trained on"):
        fit(setup(), given, FILE)


def test_classes_in_another_order_are_taken_by_their_names() -> None:
    fitted, warning = fit(setup(("dog", "bee", "cat")), attributes(setup()), FILE, resumed=True)
    assert warning == (
        "arrays numbers its classes otherwise (dog, bee, cat) than the network does (bee, cat, dog): they are taken by "
        "their names"
    )
    assert fitted.dataset.class_names == ("bee", "cat", "dog")
    assert fitted.dataset.test is not None
    for split in (fitted.dataset.train, fitted.dataset.test):
        assert split.targets().tolist() == [1, 2, 0, 1, 0], "cat, dog, bee, cat, bee"
    same, nothing = fit(setup(), attributes(setup()), FILE)
    assert (same.dataset.train.targets().tolist(), nothing) == (LABELS.tolist(), None)


def test_some_of_the_classes_are_enough_for_an_evaluation() -> None:
    some = setup(("cow", "dog", "bee"))
    with pytest.raises(
        nt.DataError,
        match=r"arrays: has the classes cow, dog, bee, but the network of run/model\.h5 was trained on bee, cat, dog; ",
    ):
        fit(some, attributes(setup()), FILE)
    x = np.zeros((2, 2))
    part = nt.plan([nt.Linear(3)], nt.from_arrays(x, [1, 0], classes=("bee", "dog")), batch_size=2).setup
    fitted, warning = fit(part, attributes(setup()), FILE)
    assert (fitted.dataset.train.targets().tolist(), fitted.dataset.classes) == ([2, 0], 3)
    assert warning is not None
    assert "has only some (bee, dog) of the classes that the network was trained on (bee, cat, dog)" in warning
    with pytest.raises(nt.DataError, match=r"has 2 training rows, but the checkpoint .* was made with 5"):
        fit(part, attributes(setup()), FILE, resumed=True)


@pytest.mark.parametrize(("before", "now"), [(3, ("bee", "cat", "dog")), (("bee", "cat", "dog"), None)])
def test_names_on_one_side_only_are_doubtful(before: Any, now: Any) -> None:
    fitted, warning = fit(setup(now), attributes(setup(before)), FILE)
    assert fitted.dataset.train.targets().tolist() == LABELS.tolist()
    assert warning is not None
    assert "names its classes (bee, cat, dog)" in warning
    assert fit(setup(3), attributes(setup(None)), FILE)[1] is None


def test_other_preparation_and_other_rows_are_refused() -> None:
    before = attributes(setup(mean=0.5))
    with pytest.raises(nt.ConfigError, match=r"data\.mean: 0\.0 is not what the network .* was trained with \(0\.5\)"):
        fit(setup(), before, FILE)
    with pytest.raises(nt.ConfigError, match=r"data\.std: \[1\.0, 2\.0\] is not what"):
        fit(setup(mean=0.5, std=[1, 2]), before, FILE)
    assert fit(setup(mean=[0.5, 0.5], rows=4), before, FILE)[1] is None
    with pytest.raises(nt.DataError, match=r"has 4 training rows, but the checkpoint .* was made with 5"):
        fit(setup(mean=0.5, rows=4), before, FILE, resumed=True)


def test_the_data_sets_of_the_package_name_their_classes() -> None:
    digits = nt.plan(nt.load_config()).setup.dataset
    assert (digits.class_names, digits.classes) == (tuple("0123456789"), 10)


def test_a_name_stands_for_one_class() -> None:
    with pytest.raises(nt.DataError, match="has a name twice"):
        setup(("bee", "cat", "bee"))
