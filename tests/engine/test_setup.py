"""From a configuration to the parts of a run: layouts of replicas, micro-batches, and what the replicas cannot have."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.config import reading as config
from nettorrent_mpi.config.reading import Config
from nettorrent_mpi.engine.layout import lay_out, micro_batches, peering_of
from nettorrent_mpi.engine.setup import _kernels, set_up
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.errors import ConfigError, LayoutError, ShapeError
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.search import fast_layouts
from nettorrent_mpi.plan.topology import Stage, Topology


def load(*changes: str) -> Config:
    """Of the built-in digits: four weight layers, batches of 32."""
    return config.load(None, ["train.micro_batches=auto", *changes])


def network(made: Config) -> Network:
    return Network(made.model.layers, (8, 8, 1))


def test_a_stage_without_neighbours_computes_a_mini_batch_at_once_where_that_takes_little_memory() -> None:
    layers = ["flatten", "{linear: {units: 100, activation: relu}}", "{linear: {units: 10}}"]  # 7510 parameters

    def pieces(ranks: int, layers: list[str], swarms: str, *changes: str, replicas: int = 1) -> int:
        layout = f"layout={{replicas: {replicas}, swarms: {swarms}}}"
        made = load(f"model.layers=[{', '.join(layers)}]", "train.micro_batches=4", layout, *changes)
        return micro_batches(made, network(made), lay_out(made, network(made), ranks))

    assert pieces(1, layers, "[{layers: 2}]") == 1
    assert pieces(1, layers, "[{layers: 2}]", "train.batch_size=86") == 1  # (64 + 100 + 10) * 86 < 2 * 7510
    assert pieces(1, layers, "[{layers: 2}]", "train.batch_size=87") == 4
    assert pieces(2, layers, "[{layers: 1}, {layers: 1}]") == 4
    assert pieces(1, [*layers[:2], "batch_norm", layers[2]], "[{layers: 2}]") == 4
    assert pieces(1, ["{conv2d: {filters: 8}}", *layers], "[{layers: 3}]") == 4
    assert pieces(2, layers, "[{layers: 2}]", replicas=2) == 1
    # Which rows a replica trains on depends on the micro-batches.
    assert pieces(2, layers, "[{layers: 2}]", "exchange=gossip", replicas=2) == 4


@pytest.mark.parametrize(("replicas", "ranks"), [(1, 5), (2, 2), (2, 12), (3, 12), (5, 20)])
def test_each_replica_is_laid_out_like_layout_layers(replicas: int, ranks: int) -> None:
    made = load(f"layout={{replicas: {replicas}}}")
    facts = network(made).facts
    topology = lay_out(made, network(made), ranks)
    assert topology == Topology(replicas, layers_layout(facts, ranks // replicas, -(-8 // replicas)).stages)
    assert topology.size == ranks
    if replicas == 1:
        assert topology == lay_out(load("layout=layers"), network(made), ranks)


def test_the_rows_that_a_layout_counts_with_are_those_of_one_replica() -> None:
    made = load("layout={replicas: 4}", "train.batch_size=16")  # micro-batches of 4 rows: 1 in each replica
    assert all(stage.rows == 1 for stage in lay_out(made, network(made), 4 * 17).stages)
    assert any(stage.rows > 1 for stage in lay_out(load("train.batch_size=16"), network(made), 17).stages)


@pytest.mark.parametrize(
    ("replicas", "ranks", "words"),
    [
        (5, 12, ["5 replicas", "12 ranks", "start 10 or 15 ranks", "layout: {replicas: 4}"]),
        (5, 3, ["start 5 ranks", "layout: {replicas: 3}"]),
        (2, 7, ["start 6 or 8 ranks", "layout: {replicas: 1}"]),
    ],
)
def test_ranks_that_the_replicas_do_not_divide(replicas: int, ranks: int, words: list[str]) -> None:
    made = load(f"layout={{replicas: {replicas}}}")
    with pytest.raises(LayoutError) as caught:
        lay_out(made, network(made), ranks)
    assert str(caught.value).startswith("layout.replicas: ")
    for word in words:
        assert word in str(caught.value)


def test_layout_auto_counts_a_common_sum_only_where_replicas_are_alike() -> None:
    for change, exact in (("exchange=allreduce", True), ("exchange=none", False), ("exchange=gossip", False)):
        made = load("layout=auto", change)
        assert made.exact == exact
        assert (
            lay_out(made, network(made), 12)
            == fast_layouts(
                network(made).facts,
                12,
                32,
                lambda stages: 4 if stages > 1 else 1,
                "1f1b",
                exact=exact,
                peering=peering_of(made, 12),
            )[0]
        )
        assert change != "exchange=gossip" or lay_out(made, network(made), 12).replicas > 1


@pytest.mark.parametrize(
    ("changes", "stages", "replicas", "expected"),
    [
        ([], 1, 1, 1),
        ([], 4, 1, 4),
        (["train.batch_size=3"], 4, 1, 3),
        (["train.micro_batches=7"], 1, 1, 7),
        (["pipeline=async"], 1, 1, 1),
        (["pipeline=async"], 3, 1, 4),
        (["pipeline=async"], 9, 1, 9),
        (["pipeline=async"], 9, 4, 8),  # 32 / 4 rows in a replica
        (["pipeline=async"], 9, 32, 4),
        (["pipeline=async", "train.micro_batches=2"], 9, 1, 2),
        (["pipeline=async", "train.batch_size=3"], 9, 1, 3),
        (["pipeline=gpipe"], 9, 1, 4),
        (["pipeline=zero_bubble"], 1, 1, 1),
        (["pipeline=zero_bubble", "train.micro_batches=7"], 2, 1, 7),
        (["pipeline=zero_bubble", "train.batch_size=3"], 4, 1, 3),
    ],
)
def test_micro_batches(changes: list[str], stages: int, replicas: int, expected: int) -> None:
    made = load(*changes)
    topology = Topology(replicas, tuple(Stage(s, s + 1, 1, 1) for s in range(stages)))
    assert micro_batches(made, network(made), topology) == expected


def test_a_split_pipeline_has_the_micro_batches_that_are_predicted_to_be_fastest() -> None:
    """There are as many micro-batches as pay: fewer where calls cost more, none without a row in each replica."""
    layers = "[flatten, " + ", ".join(["{linear: 512}"] * 5) + ", {linear: 10}]"
    made = load("pipeline=zero_bubble", f"model.layers={layers}", "train.batch_size=256")
    topology = Topology(1, (Stage(0, 3, 1, 1), Stage(3, 6, 1, 1)))

    def found(**figures: float) -> int:
        return micro_batches(made, network(made), topology, Machine(update=0.0, **figures))

    assert found(overhead=0.0, latency=0.0, flops=1e9) == 6  # 8 would gain 1 %
    assert found() == 4
    assert found(overhead=1e-3) == 2
    apart = Topology(100, topology.stages)
    assert micro_batches(made, network(made), apart) == 2, "256 rows are 2 for each replica"


@pytest.mark.parametrize("stages", [1, 3, 9])
def test_with_batch_norm_micro_batches_do_not_depend_on_the_layout(stages: int) -> None:
    made = load("model.layers.1=batch_norm", "pipeline=async")
    topology = Topology(1, tuple(Stage(s, s + 1, 1, 1) for s in range(stages)))
    assert network(made).has_batch_norm
    assert micro_batches(made, network(made), topology) == 4


@pytest.mark.parametrize(
    ("exchange", "nobody"), [("elite", "nobody to take weights from"), ("gossip", "nobody to average with")]
)
def test_an_exchange_of_one_replica_is_refused(exchange: str, nobody: str) -> None:
    for layout in ("layers", "{replicas: 1}"):
        with pytest.raises(ConfigError) as caught:
            set_up(load(f"exchange={exchange}", f"layout={layout}", "data.validation=0.1"), 4)
        assert caught.value.key == f"exchange.{exchange}"
        assert "changes nothing with 1 replica" in str(caught.value)
        assert nobody in str(caught.value)
        assert "give layout: {replicas: N} or exchange: allreduce" in str(caught.value)


def test_one_replica_may_have_the_other_exchanges() -> None:
    for exchange in ("allreduce", "none"):
        assert set_up(load(f"exchange={exchange}"), 2).topology.replicas == 1


def test_a_pairing_that_the_replicas_cannot_have() -> None:
    with pytest.raises(ConfigError) as caught:
        set_up(load("exchange.gossip.pairing=hypercube", "layout={replicas: 6}"), 6)
    assert caught.value.key == "exchange.gossip.pairing"
    assert "6 replicas can have ring" in str(caught.value)
    assert set_up(load("exchange.gossip.pairing=hypercube", "layout={replicas: 8}"), 8).topology.replicas == 8


def test_a_replica_of_its_own_without_rows_is_refused() -> None:
    layout = "layout={replicas: 4, swarms: [{layers: 2}, {layers: 2}]}"
    for exchange in ("none", "gossip", "elite"):
        changes = (layout, f"exchange={exchange}", "data.validation=0.1")
        with pytest.raises(ConfigError) as caught:
            set_up(load("train.batch_size=12", *changes), 8)
        assert caught.value.key == "train.batch_size"
        assert "12 rows in 4 micro-batches leave 1 of the 4 replicas nothing to train on" in str(caught.value)
        assert "at least 13 rows, or fewer micro_batches" in str(caught.value)
        for enough in ("train.batch_size=13", "train={batch_size: 12, micro_batches: 3}"):
            setup = set_up(load(enough, *changes), 8)
            pieces, size = setup.options.micro_batches, setup.options.batch_size
            for rank in range(8):
                place = setup.topology.place(rank)
                assert sum(setup.topology.batch_rows(place, size, pieces, m).size for m in range(pieces)) > 0
    assert set_up(load("train.batch_size=12", layout), 8).config.exact


@pytest.mark.parametrize(
    ("layers", "exchange", "replicas", "enough", "said"),
    [
        (
            "[flatten, {linear: 8}, batch_norm, {linear: 10}]",
            "gossip",
            4,
            32,
            "batch_norm1 a single row of each of the 4 replicas",
        ),
        ("[flatten, {linear: 8}, batch_norm, {linear: 10}]", "allreduce", 4, 8, "batch_norm1 a single row at a time"),
        ("[flatten, {linear: 8}, {residual: [{linear: 8}, batch_norm]}, {linear: 10}]", "none", 2, 16, "residual1/"),
    ],
)
def test_a_batch_norm_of_single_rows_is_refused(
    layers: str, exchange: str, replicas: int, enough: int, said: str
) -> None:
    changes = (f"model.layers={layers}", f"exchange={exchange}", f"layout={{replicas: {replicas}}}")
    with pytest.raises(ConfigError) as caught:
        set_up(load(f"train.batch_size={enough - 1}", *changes), replicas)
    assert caught.value.key == "train.batch_size"
    assert said in str(caught.value)
    assert f"at least {enough} rows, or fewer micro_batches" in str(caught.value)
    set_up(load(f"train.batch_size={enough}", *changes), replicas)


def test_a_batch_norm_of_images_takes_single_rows() -> None:
    layers = "[{conv2d: 4}, batch_norm, flatten, {linear: 10}]"
    set_up(load(f"model.layers={layers}", "train={batch_size: 4, micro_batches: 4}"), 1)


@pytest.mark.parametrize(
    "layers", ["[flatten, {linear: {units: 10, activation: sigmoid}}]", "[flatten, {linear: 10}, dropout]"]
)
def test_an_end_that_the_loss_does_not_take_is_refused(layers: str) -> None:
    with pytest.raises(ConfigError, match="comes last"):
        set_up(load(f"model.layers={layers}"), 2)


@pytest.mark.parametrize("exchange", ["elite", "allreduce"])
def test_validation_rows_that_round_to_none_are_refused(exchange: str) -> None:
    with pytest.raises(ConfigError) as caught:
        set_up(load(f"exchange={exchange}", "data.validation=0.0001", "layout={replicas: 2}"), 2)
    assert caught.value.key == "data.validation"
    assert "0.0001 of 1438 rows is less than one" in str(caught.value)


def test_the_engine_and_the_sampler_are_given_what_was_asked_for() -> None:
    made = load("exchange.gossip.every=3", "pipeline={async: true}", "layout={replicas: 2}", "data.partition=disjoint")
    setup = set_up(made, 8)
    assert setup.options.exchange == choices.Gossip(every=3)
    assert setup.options.pipeline == choices.Async(staleness_aware=True)
    assert setup.options.micro_batches == setup.sampler.micro_batches == 4
    assert (setup.sampler.replicas, setup.sampler.partition) == (2, "disjoint")
    shared = set_up(load("layout={replicas: 2}"), 8).sampler
    assert not np.array_equal(shared.order(0), setup.sampler.order(0))
    np.testing.assert_array_equal(shared.order(0), set_up(load(), 4).sampler.order(0))


def test_the_line_about_the_learning_rate_has_what_exchange_and_pipeline_make_of_it() -> None:
    def line(*changes: str, ranks: int = 8) -> str:
        rate = ("train.optimizer={adam: 0.01}", "train.schedule=constant", "train.epochs=2")
        return set_up(load(*rate, *changes), ranks).rates_line

    gossip = ("exchange=gossip", "layout={replicas: 4}")
    assert line() == "0.01 in all steps (constant)"
    grown = "0.01 in the first step, at most 0.02, 0.02 in the last step (constant, times gossip's rate factor)"
    assert line(*gossip) == grown
    assert line(*gossip, "exchange.gossip.rate_factor=3") == "0.03 in all steps (constant, times gossip's rate factor)"
    assert line(*gossip, "train.optimizer={sgd: 0.01}") == "0.01 in all steps (constant)"
    late = line("pipeline={async: true}", "train.micro_batches=2", ranks=4)
    assert late == "0.01 in all steps (constant, in stages 0 to 3 times 0.4, 0.5, 0.667, 1)"
    falling = set_up(load(*gossip, "train.optimizer={adam: 0.01}", "train.schedule=cosine"), 4).rates
    assert falling.first == 0.01
    assert 0.01 < falling.highest < 0.02
    assert falling.last == 0


@pytest.mark.parametrize(
    ("asked", "steps", "ranks", "expected"),
    [
        ("auto", 10, 1, "numpy"),  # over before the libraries are loaded
        ("auto", 1_000_000, 4, "fastest"),
        ("auto", 1_000_000, 1_000_000, "numpy"),
        ("numpy", 1_000_000, 1, "numpy"),
        ("fastest", 1, 1, "fastest"),
    ],
)
def test_short_runs_load_no_kernels_unless_told(asked: str, steps: int, ranks: int, expected: str) -> None:
    made = load(f"kernels={asked}", "train.epochs=null", f"train.steps={steps}")
    assert _kernels(made, network(made), ranks, 45) == expected


DATA = "data={name: synthetic, rows: 90, shape: SHAPE, classes: 4, test_rows: 30}"
DENSE = "model.layers=[flatten, {linear: 4}]"
SMALL = (DATA.replace("SHAPE", "[3, 3, 1]"), DENSE, "train={steps: 40, batch_size: 16, stop_at: {accuracy: 0.5}}")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.test_rows=0"], "neither test rows nor validation rows; add data.validation: 0.1"),
        (["model.loss=mean_squared_error", "model.layers.1.linear=1"], "mean_squared_error of 1 output and labels"),
    ],
)
def test_an_accuracy_that_nothing_measures_stops_no_training(changes: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match="is never measured") as caught:
        set_up(load(*SMALL, *changes), 1)
    assert caught.value.key == "train.stop_at.accuracy"
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("[1, 2, 3]", "has 3 numbers, but the last layer has 4 units: give one for each class"),
        ("[1]", "has 1 number, but"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(weights: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        set_up(load(*SMALL, f"model.loss.cross_entropy.class_weights={weights}"), 1)
    assert caught.value.key == "model.loss.cross_entropy.class_weights"


def test_an_accuracy_that_something_measures_may_stop_a_training() -> None:
    assert set_up(load(*SMALL), 1).warnings == ()
    assert set_up(load(*SMALL, "data.test_rows=0", "data.validation=0.1"), 1).warnings == ()


@pytest.mark.parametrize(
    ("changes", "ranks", "told"),
    [
        (["model.loss=mean_squared_error", "model.layers.1.linear=1", "train.stop_at=null"], 1, "numbers 0 to 3"),
        (["model.layers.1.linear=6"], 1, "the last layer has 6 units, but the data has 4 classes"),
        (["train.evaluate_every=7"], 1, "train.stop_at: the accuracy is measured every 7 epochs"),
        (["layout={swarms: [{rows: 17}]}"], 17, "layout: stage 0 divides the rows of a micro-batch over 17 ranks"),
        (["layout={replicas: 2, swarms: [{rows: 9}]}"], 18, "over 9 ranks of a replica, but there are 8"),
        (["layout={replicas: 2}", "exchange.gossip.every=50"], 2, "gossip.every: 50 steps, but the run has 40"),
        (["layout={replicas: 2}", "exchange={elite: 641}", "data.validation=0.1"], 2, "elite.every_samples: 641, but"),
        (["data.shape=[3, 8, 9]", "model.layers=[{conv2d: 2}, flatten, {linear: 4}]"], 1, "8 pixels in 9 channels; if"),
        (["data.shape=[1, 8, 8]", "data.augment=[flip]"], 1, "x.transpose(0, 2, 3, 1)"),
    ],
)  # fmt: skip
def test_what_is_doubtful_is_told_in_one_line(changes: list[str], ranks: int, told: str) -> None:
    (text,) = set_up(load(*SMALL, *changes), ranks).warnings
    assert told in text
    assert "\n" not in text


@pytest.mark.parametrize("shape", ["[8, 8, 3]", "[3, 8, 4]", "[1, 8, 9]", "[3, 40]", "[3, 8, 8]"])
def test_images_and_sequences_are_not_taken_for_others(shape: str) -> None:
    layers = "[{conv2d: {filters: 2, kernel: [1, 3]}}, flatten, {linear: 4}]"
    model = DENSE if shape in ("[3, 40]", "[3, 8, 8]") else f"model.layers={layers}"
    assert set_up(load(*SMALL, DATA.replace("SHAPE", shape), model), 1).warnings == ()


def test_a_layer_that_does_not_fit_channels_first_says_so() -> None:
    with pytest.raises(ShapeError, match=r"kernel of 3 x 3 is larger than the 1 x 28 .*channels come first"):
        set_up(load(DATA.replace("SHAPE", "[1, 28, 28]"), "model.layers=[{conv2d: 2}, flatten, {linear: 4}]"), 1)


def test_a_file_without_test_rows_is_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file["x"], file["y"] = np.zeros((40, 3)), np.arange(40) % 2
    changes = [f"data={{name: hdf5, root: {tmp_path}/set.h5}}", "model.layers=[{linear: 2}]"]
    (told,) = set_up(load(*changes), 1).warnings
    assert told.startswith(f"{tmp_path}/set.h5 has no test set (x_test, y_test), so nothing shows how well ")
    assert set_up(load(*changes, "data.validation=0.1"), 1).warnings == ()


def test_kernels_of_cpu_cores_are_told_of_on_a_gpu() -> None:
    told = ("kernels: numpy is for CPU cores: a GPU has kernels of its own",)
    assert set_up(load(*SMALL, "kernels=numpy"), 1, device="gpu").warnings == told
    assert set_up(load(*SMALL, "kernels=numpy"), 1, device="cpu").warnings == ()


def test_bfloat16_on_cores_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nettorrent_mpi.engine.setup.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ml_dtypes, which is not installed: pip install 'nettorrent_mpi\[fast\]'"):
        set_up(load("dtype=bfloat16", "device=cpu"), 1)
