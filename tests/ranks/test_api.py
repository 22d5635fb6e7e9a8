"""The Python interface on all ranks: trainers on the world and on parts of it, in turn and closed in any order."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mpi4py import MPI

import nettorrent_mpi as nt

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
LAYERS = [nt.Linear(12, activation="tanh"), nt.Linear(9, activation="relu"), nt.Linear(3)]
HOW: dict[str, Any] = {"optimizer": nt.Adam(0.01), "batch_size": 20, "dtype": "float64", "kernels": "numpy"}


def rows() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(100, 6)), random.integers(0, 3, 100)
    return x[:80], y[:80], x[80:], y[80:]


def serial(**train: int) -> dict[str, np.ndarray]:
    """The weights of the same training on one rank."""
    with nt.Trainer(LAYERS, rows(), comm=MPI.COMM_SELF, **HOW) as trainer:
        assert list(trainer.train(**train))
        return trainer.parameters()


def same(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(mine) == list(other) == [f"linear{n}/{name}" for n in (1, 2, 3) for name in ("weight", "bias")]
    for key, array in other.items():
        np.testing.assert_allclose(mine[key], array, rtol=0, atol=1e-10 * np.abs(array).max(), err_msg=key)


def test_a_trainer_gives_the_serial_weights_and_the_same_records_on_all_ranks(world: MPI.Intracomm) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, report_every=3, **HOW) as trainer:
        assert (trainer.rank, trainer.size) == (RANK, SIZE)
        records = list(trainer.train(epochs=2))
        assert [record.step for record in records] == [3, 4, 6, 8]
        assert [record.at_rest for record in records] == [False, True, False, True]
        assert records[1].test_accuracy is not None
        assert records[0].test_accuracy is None
        told = world.allgather([(r.step, r.train_loss, r.test_loss, r.learning_rate) for r in records])
        assert all(each == told[0] for each in told)
        found = trainer.evaluate()
        assert found.test is not None
        assert (found.test.loss, found.validation) == (records[-1].test_loss, None)
        same(trainer.parameters(), serial(epochs=2))
        list(trainer.train(steps=3))
        assert trainer.step == 11
        same(trainer.parameters(), serial(steps=11))


def test_compressed_rows_train_alike_whether_they_are_read_once_or_batch_by_batch(
    world: MPI.Intracomm, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank of a node decides: here it alone sees that memory is short."""
    from nettorrent_mpi.engine import wiring

    if RANK == 0:
        with h5py.File(shared_path / "set.h5", "w") as file:
            for name, values in zip(("x", "y", "x_test", "y_test"), rows(), strict=True):
                file.create_dataset(name, data=values, chunks=(7, 2)[: values.ndim], compression="gzip")
    world.barrier()
    data = {"name": "hdf5", "root": str(shared_path / "set.h5")}
    for free in (1 << 40, 0):
        monkeypatch.setattr(wiring, "free_memory", lambda free=free: free if RANK == 0 else 1 << 40)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            trainer = nt.Trainer(LAYERS, data, comm=world, **HOW)
        short = [each for each in given if "do not fit" in str(each.message)]
        assert len(short) == (0 if free else 2 if trainer.setup.topology.place(RANK).stage == 0 else 0)
        with trainer:
            list(trainer.train(epochs=2))
            same(trainer.parameters(), serial(epochs=2))


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("rows", "micro_batches"), [(1, 1), (16, 16)])
def test_a_small_last_mini_batch_does_no_harm_to_batch_norm(rows: int, micro_batches: int) -> None:
    """The steps of an epoch but the last have 64 rows; the test loss before and after it differs little."""
    random = np.random.default_rng(1)
    centres, y = random.normal(size=(8, 20)), random.integers(0, 8, 1536 + rows)
    x = centres[y] * 0.8 + random.normal(size=(len(y), 20))
    layers = [nt.Linear(32), nt.BatchNorm(), nt.Relu(), nt.Linear(32), nt.BatchNorm(), nt.Relu(), nt.Linear(8)]
    how: dict[str, Any] = {"optimizer": nt.Adam(0.003), "batch_size": 64, "micro_batches": micro_batches}
    with nt.Trainer(layers, (x, y, x, y), comm=MPI.COMM_SELF, kernels="numpy", **how) as trainer:
        for _ in range(2):
            list(trainer.train(steps=24))
            before = trainer.evaluate().test
            list(trainer.train(steps=1))
            after = trainer.evaluate().test
            assert before is not None
            assert after is not None
            assert after.loss < 1.2 * before.loss


def test_a_warm_up_needs_more_steps_than_it_takes(world: MPI.Intracomm) -> None:
    how: dict[str, Any] = {"comm": world, **HOW, "schedule": nt.Cosine(warmup_steps=5)}
    with nt.Trainer(LAYERS, rows(), **how) as trainer:
        with pytest.raises(nt.ConfigError, match="5 steps, but the run has 5"):
            trainer.train(steps=5)
        assert [record.learning_rate for record in trainer.train(steps=6)][-1] == pytest.approx(0.01)
    with pytest.raises(nt.ConfigError, match=r"train\.schedule\.cosine\.warmup_steps: 5 steps"):
        nt.Trainer(LAYERS, rows(), steps=4, **how)


def told_by_trainer(world: MPI.Intracomm, *trainer: Any, **how: Any) -> list[list[str]]:
    """The warnings that each rank gives."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        nt.Trainer(*trainer, comm=world, **HOW | how).close()
    return world.allgather([str(each.message) for each in given if each.category is nt.NetTorrentWarning])


def test_rank_0_alone_warns_of_what_all_find(world: MPI.Intracomm) -> None:
    told = told_by_trainer(world, LAYERS, rows(), batch_size=81)
    assert [len(each) for each in told] == [1] + [0] * (SIZE - 1)
    assert "only 80 training rows" in told[0][0]


def test_one_rank_warns_of_inputs_in_another_unit(world: MPI.Intracomm) -> None:
    x, y, *_ = rows()
    for data, told in (
        (nt.from_arrays(x / 4 + 0.5, y, mean=125.3, std=63.0), "data.mean: it leaves values of about -1.98"),
        (nt.from_arrays(255 * abs(x), y), "data: values of x are as large as"),
        (nt.from_arrays(x, y, mean=0.1, std=1.1), None),
        (nt.from_arrays((100 * abs(x)).astype(np.uint8), y, mean=0.5, std=0.2), None),
    ):
        texts = [text for each in told_by_trainer(world, LAYERS, data) for text in each]
        assert len(texts) == (told is not None), texts
        assert told is None or told in texts[0]


def test_one_rank_warns_of_targets_that_the_network_cannot_reach(world: MPI.Intracomm) -> None:
    x = rows()[0]
    layers = [*LAYERS[:2], nt.Linear(1, activation="tanh")]
    told = told_by_trainer(world, layers, (x, 2 * np.sin(x[:, :1])), loss="mean_squared_error")
    (text,) = (text for each in told for text in each)
    assert "linear3.tanh" in text
    assert told_by_trainer(world, layers, (x, np.sin(x[:, :1])), loss="mean_squared_error") == [[]] * SIZE


def test_a_loop_that_is_left_comes_to_rest_and_goes_on(world: MPI.Intracomm) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, report_every=2, evaluate_every=100, epochs=25, **HOW) as trainer:
        for record in trainer.train():
            if record.step == 6:
                break
        steps = world.allgather(trainer.step)
        assert len(set(steps)) == 1
        assert 6 <= steps[0] <= 100
        assert trainer.evaluate().test is not None
        list(trainer.train())
        assert trainer.step == 100
        same(trainer.parameters(), serial(steps=100))


@pytest.mark.parametrize("step", [4, 6])
def test_a_loop_that_one_rank_leaves_ends_on_all(world: MPI.Intracomm, step: int) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, report_every=2, epochs=25, **HOW) as trainer:  # step 4 ends an epoch
        for record in trainer.train():
            if RANK == SIZE - 1 and record.step == step:
                break
        steps = world.allgather(trainer.step)
        assert len(set(steps)) == 1
        assert step <= steps[0] < 100
        assert trainer.evaluate().test is not None
        list(trainer.train(steps=2))
        same(trainer.parameters(), serial(steps=steps[0] + 2))


@pytest.mark.ranks(2, 3, 4, 5)  # one rank alone stops where it leaves
@pytest.mark.parametrize("leavers", ["all", "one"])
def test_an_error_after_a_loop_was_left_is_raised_by_the_next_call(world: MPI.Intracomm, leavers: str) -> None:
    how = {
        **HOW,
        "optimizer": nt.Sgd(1e300),
        "report_every": 1,
        "comm": world,
        "epochs": 3,
    }  # diverges in the second step

    def leave(trainer: nt.Trainer) -> None:
        for record in trainer.train():
            if record.step == 1 and (leavers == "all" or RANK == SIZE - 1):
                break

    with nt.Trainer(LAYERS, rows(), **how) as trainer:
        if leavers == "all" or RANK == SIZE - 1:
            leave(trainer)
            with pytest.raises(nt.NonFiniteError):
                trainer.predict(rows()[0])
        else:
            with pytest.raises(nt.NonFiniteError):
                leave(trainer)


def test_a_closed_trainer_says_so(world: MPI.Intracomm) -> None:
    trainer = nt.Trainer(LAYERS, rows(), comm=world, **HOW)
    begun = trainer.train(epochs=3)
    next(begun)
    trainer.close()
    assert not list(begun)
    for call in (trainer.evaluate, trainer.train, trainer.parameters, lambda: trainer.predict(rows()[0])):
        with pytest.raises(nt.UserError, match="closed"):
            call()


def test_a_mistake_of_one_rank_ends_the_call_on_all(world: MPI.Intracomm) -> None:
    x, y, *_ = rows()
    mistaken = RANK == SIZE - 1
    with nt.Trainer(LAYERS, (x, y), comm=world, **HOW) as trainer:
        with pytest.raises(nt.UserError):
            trainer.predict(x[:, : 5 if mistaken else 6])
        with pytest.raises(nt.UserError):
            nt.Trainer(LAYERS, (x, y), comm=world, **HOW, **({"bach_size": 3} if mistaken else {}))
        if SIZE > 1:
            with pytest.raises(nt.UserError, match="rows to predict"):
                trainer.predict(x[: 9 if mistaken else 10])
            with pytest.raises(nt.UserError, match="length of training"):
                trainer.train(steps=2 if mistaken else 3)
        list(trainer.train(steps=2))
        same(trainer.parameters(), serial(steps=2))


def test_between_rests_nothing_collective_is_begun(world: MPI.Intracomm) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, report_every=2, **HOW) as trainer:
        for record in trainer.train(epochs=1):
            if record.at_rest:
                assert trainer.evaluate().test is not None
            else:
                with pytest.raises(nt.UserError, match="at_rest"):
                    trainer.evaluate()
        with pytest.raises(nt.UserError, match="both"):
            trainer.train(epochs=1, steps=1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_trainers_on_the_world_and_on_parts_of_it(world: MPI.Intracomm, order: tuple[int, ...]) -> None:
    part = world.Split(RANK % 2)
    trainers = [
        nt.Trainer(LAYERS, rows(), comm=world, **HOW),
        nt.Trainer(LAYERS, rows(), comm=part, **HOW),
        nt.Trainer(LAYERS, rows(), comm=world, **(HOW | {"batch_size": 16})),
    ]
    for turn in range(2):
        for trainer in trainers:
            list(trainer.train(steps=3 + turn))
    same(trainers[0].parameters(), serial(steps=7))
    same(trainers[1].parameters(), serial(steps=7))
    for n in order:
        trainers[n].close()
        left = [trainer for m, trainer in enumerate(trainers) if m in order[order.index(n) + 1 :]]
        for trainer in left:
            list(trainer.train(steps=1))
    trainers[0].close()
    part.Free()


def test_a_plan_that_a_host_has_made_of_other_data_is_refused(world: MPI.Intracomm) -> None:
    x, y, *test = rows()
    other = RANK == SIZE - 1 > 0
    planned = nt.plan(LAYERS, (x[other:], y[other:], *test), ranks=SIZE, **HOW)
    if SIZE > 1:
        with pytest.raises(nt.UserError, match=r"has another plan .79 training rows .* than rank 0 .80 training"):
            nt.Trainer(planned, comm=world)


@pytest.mark.parametrize("kind", ["rows", "labels", "names", "file", "names of a file"])
def test_other_data_of_the_same_size_are_refused(world: MPI.Intracomm, shared_path: Path, kind: str) -> None:
    x, y, *_ = rows()
    other, names = RANK == SIZE - 1 > 0, ["a", "b", "c"]
    if other and kind.startswith("names"):
        names.reverse()
    if other and kind != "labels" and not kind.startswith("names"):
        x = x[::-1]
    if other and kind == "labels":
        y = y[::-1].copy()
    data = nt.from_arrays(x, y, classes=names)
    if kind.endswith("file"):
        path = shared_path / f"rank-{RANK}.h5"
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = x, y
            file.attrs["classes"] = names
        network = nt.load_config(None, "data.name=hdf5", f"data.root={path}", "model.layers=[{linear: 3}]")
        planned = nt.plan(network, ranks=SIZE)
    else:
        planned = nt.plan(LAYERS, data, ranks=SIZE, **HOW)
    if SIZE > 1:
        with pytest.raises(nt.UserError, match=r"has another data set .*classes a, b, c.* have to see the same files"):
            nt.Trainer(planned, comm=world)


def test_mistakes_end_one_trainer_on_all_ranks(world: MPI.Intracomm) -> None:
    x, y, *_ = rows()
    with nt.Trainer(LAYERS, (x, y), comm=world, **HOW) as other:
        for network, data, settings, words in (
            (LAYERS, (x, y), {"bach_size": 3}, "did you mean batch_size"),
            (LAYERS, (x, y), {"optimizer": "adm"}, "did you mean adam"),
            (LAYERS, (x, y[:-1]), {}, "79"),
            (LAYERS, (x, y, x), {}, r"\(x, y\)"),
            (LAYERS, None, {}, "needs data"),
            ([nt.Linear(2)], (x, y), {}, "3 classes"),
            ([nt.Flatten()], (x, y), {}, "weights"),
        ):
            with pytest.raises(nt.UserError, match=words):
                nt.Trainer(network, data, comm=world, **settings)  # type: ignore[arg-type]
        list(other.train(steps=1))


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_predictions_are_the_serial_ones_on_all_ranks(world: MPI.Intracomm, count: int) -> None:
    x = np.random.default_rng(5).normal(size=(count, 6))
    found = []
    for comm in (MPI.COMM_SELF, world):
        with nt.Trainer(LAYERS, rows(), comm=comm, **HOW) as trainer:
            list(trainer.train(epochs=1))
            found.append(trainer.predict(x))
            if comm is world:
                scores = trainer.evaluate().test
                right = trainer.predict(rows()[2]).argmax(axis=1) == rows()[3]
                assert scores is not None
                assert scores.accuracy == right.mean()
                with pytest.raises(nt.DataError, match="the network reads"):
                    trainer.predict(x[:, :5])
    assert found[0].shape == (count, 3)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert len(set(world.allgather(found[1].tobytes()))) == 1


def test_divergence_ends_one_trainer_on_all_ranks(world: MPI.Intracomm, shared_path: Path) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, **HOW) as other:
        settings = HOW | {"optimizer": nt.Sgd(1e200)}
        with (
            pytest.raises(nt.NonFiniteError, match="is not finite") as caught,
            nt.Trainer(LAYERS, rows(), comm=world, output=shared_path, **settings) as trainer,
        ):
            list(trainer.train(epochs=20))
        assert len(set(world.allgather(str(caught.value)))) == 1
        assert not list(shared_path.rglob("*.h5"))
        list(other.train(steps=2))


def test_a_trainer_that_diverged_starts_again_from_a_file(world: MPI.Intracomm, shared_path: Path) -> None:
    settings = HOW | {"optimizer": nt.Sgd(1e200)}
    with nt.Trainer(LAYERS, rows(), comm=world, **settings) as trainer:
        trainer.save(shared_path / "first.h5")
        first = trainer.parameters()
        for _ in range(2):
            with pytest.raises(nt.NonFiniteError):
                list(trainer.train(epochs=20))
            trainer.load(shared_path / "first.h5")
            for key, array in first.items():
                np.testing.assert_array_equal(trainer.parameters()[key], array)
            assert trainer.evaluate().test is not None


def test_files(world: MPI.Intracomm, shared_path: Path) -> None:
    with nt.Trainer(LAYERS, rows(), comm=world, output=shared_path, **HOW) as trainer:
        list(trainer.train(epochs=2))
        trainer.save(shared_path / "model.h5")
        mine = trainer.parameters()
    with nt.Trainer(LAYERS, rows(), comm=world, **HOW) as trainer:
        trainer.load(shared_path / "model.h5")
        same(trainer.parameters(), mine)
        trainer.resume(shared_path)
        assert trainer.step == 8
        list(trainer.train(epochs=1))
        same(trainer.parameters(), serial(epochs=3))
    with nt.Trainer(LAYERS, rows(), comm=world, **(HOW | {"batch_size": 10})) as trainer:
        with pytest.raises(nt.ConfigError, match="batch_size"):
            trainer.resume(shared_path)
        with pytest.raises(nt.OutputError, match="could not be written"):
            trainer.save(shared_path / "no" / "model.h5")


def test_a_configuration_with_changes_and_rows_of_ones_own(world: MPI.Intracomm) -> None:
    random = np.random.default_rng(1)
    data = random.integers(0, 256, (64, 8, 8, 1), np.uint8), random.integers(0, 10, 64)
    with nt.Trainer(nt.load_config(None, "train.batch_size=16"), data, comm=world, steps=5) as trainer:
        assert trainer.planned.config.data.name == "arrays"
        records = list(trainer.train())
        assert (trainer.step, records[-1].test_loss, records[-1].samples) == (5, None, 80)
        assert trainer.summary()["world_size"] == SIZE


@pytest.mark.ranks(1, 2, 4)
def test_replicas_that_differ_are_saved_as_one_network(world: MPI.Intracomm) -> None:
    if SIZE == 1:
        with pytest.raises(nt.ConfigError, match="1 replica"):
            nt.Trainer(LAYERS, rows(), comm=world, exchange="gossip", **HOW)
        return
    settings = HOW | {"exchange": {"gossip": {"pairing": "ring"}}, "layout": {"replicas": 2}}
    with nt.Trainer(LAYERS, rows(), comm=world, **settings) as trainer:
        records = list(trainer.train(epochs=2))
        assert records[-1].consensus_distance is not None
        average = trainer.parameters()
        assert all(np.isfinite(array).all() for array in average.values())
        before = trainer.evaluate().test
        summary = trainer.summary()
        assert before is not None
        np.testing.assert_allclose(summary["average"]["test_loss"], before.loss, rtol=1e-12)
        same(trainer.parameters(), average)


def test_signal_handlers_stay_unless_asked_for(world: MPI.Intracomm) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with nt.Trainer(LAYERS, rows(), comm=world, **HOW):
        assert signal.getsignal(signal.SIGUSR2) == before
    with nt.Trainer(LAYERS, rows(), comm=world, stop_on_signals=True, epochs=400, **HOW) as trainer:
        assert signal.getsignal(signal.SIGUSR2) != before
        if RANK == SIZE - 1:
            signal.raise_signal(signal.SIGUSR2)
        list(trainer.train())
        assert trainer.stopped_by == "signal"
        assert len(set(world.allgather(trainer.step))) == 1
        assert trainer.step < 1600
    assert signal.getsignal(signal.SIGUSR2) == before


def test_classes_are_taken_by_their_names_from_a_file(world: MPI.Intracomm, shared_path: Path) -> None:
    x, y, x_test, y_test = rows()
    names, other = ("bee", "cat", "dog"), ("dog", "bee", "cat")  # other's labels are 1 more
    path, how = shared_path / "model.h5", HOW | {"report_every": 2}
    data = nt.from_arrays(x, y, x_test, y_test, classes=names)
    with nt.Trainer(LAYERS, data, comm=world, output=shared_path, **how) as trainer:
        list(trainer.train(epochs=1))
        trainer.save(path)
        found, after = trainer.evaluate(), list(trainer.train(epochs=1))[-1]
        weights = trainer.parameters()
    turned = nt.from_arrays(x, (y + 1) % 3, x_test, (y_test + 1) % 3, classes=other)
    with nt.Trainer(LAYERS, turned, comm=world, **how) as trainer, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        trainer.load(path)
        assert trainer.evaluate() == found
        trainer.resume(sorted((shared_path / "checkpoints").iterdir())[0])
        (record,) = [each for each in trainer.train(epochs=1) if each.evaluated]
        assert (record.step, record.test_accuracy) == (after.step, after.test_accuracy)
        same(trainer.parameters(), weights)
    assert len([each for each in given if "taken by their names" in str(each.message)]) == (RANK == 0)
    strange = nt.from_arrays(x, y, x_test, y_test, classes=("bee", "cat", "cow"))
    with nt.Trainer(LAYERS, strange, comm=world, **how) as trainer:
        before = trainer.parameters()
        for take in (trainer.load, trainer.resume):
            with pytest.raises(
                nt.DataError, match=r"has the classes bee, cat, cow, but the network of .* bee, cat, dog"
            ):
                take(path if take == trainer.load else shared_path)
        same(trainer.parameters(), before)


def test_another_runs_checkpoints_do_not_give_way(world: MPI.Intracomm, shared_path: Path) -> None:
    how = HOW | {"epochs": 2, "checkpoint": {"every_steps": 3}}
    with nt.Trainer(LAYERS, rows(), comm=world, output=shared_path, **how) as trainer:
        list(trainer.train())
        list(trainer.train(steps=1))
    files = sorted((shared_path / "checkpoints").iterdir())
    with nt.Trainer(LAYERS, rows(), comm=world, output=shared_path, **how) as trainer:
        with pytest.raises(nt.OutputError, match="holds another run's checkpoints: resume from them"):
            trainer.train()
        assert sorted((shared_path / "checkpoints").iterdir()) == files
        trainer.resume(shared_path)
        list(trainer.train(steps=3))
        assert trainer.step == 12
    assert (shared_path / "checkpoints" / "step-0000000012").exists()


def test_checkpoints_without_a_folder_are_told(world: MPI.Intracomm) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        nt.Trainer(LAYERS, rows(), comm=world, checkpoint={"every_steps": 3}, **HOW).close()
    assert sum("no folder for checkpoints" in str(each.message) for each in given) == (RANK == 0)
