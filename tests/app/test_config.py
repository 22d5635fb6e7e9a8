"""The configuration: what is accepted, what is said of every mistake, and that writing and reading are inverses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.app import config
from nettorrent_mpi.app.config import Config, Layout, Swarm
from nettorrent_mpi.nn import specs
from nettorrent_mpi.plan.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

BASE = """\
seed: 1
data: {name: digits}
model:
  layers:
    - conv2d: {filters: 8, kernel: 3}
    - flatten
    - dropout: 0.25
    - linear: 10
  loss: cross_entropy
train:
  epochs: 3
  optimizer: adam
"""


def loads(text: str = BASE, *overrides: str) -> Config:
    return config.loads(text, "f.yaml", overrides, output="runs/f")


def edited(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new)


def told(text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loads(text, *overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return caught.value


# (what is changed, into what, line, key, words of the message)
MISTAKES = [
    # unknown keys: the nearest, the section it belongs to, or all there are
    ("filters: 8", "filterz: 8", 5, "model.layers[0].conv2d.filterz", ["unknown key", "did you mean filters?"]),
    ("seed: 1", "sede: 1", 1, "sede", ["did you mean seed?"]),
    ("seed: 1", "seed: 1\nbatch_size: 3", 2, "batch_size", ["did you mean train.batch_size?"]),
    ("epochs: 3", "zzz: 3", 11, "train.zzz", ["possible: epochs, steps, batch_size"]),
    ("{name: digits}", "{name: digits, rooot: x}", 2, "data.rooot", ["did you mean root?"]),
    ("- flatten", "- flatten: {size: 3}", 6, "model.layers[1].flatten.size", ["unknown key", "possible: name"]),
    ("- flatten", "- flatten: 3", 6, "model.layers[1].flatten", ["no options"]),
    ("optimizer: adam", "optimizer: {adam: {beta: 1}}", 12, "train.optimizer.adam.beta", ["did you mean betas?"]),
    ("optimizer: adam", "stop_at: {acuracy: 0.8}", 12, "train.stop_at.acuracy", ["did you mean accuracy?"]),
    ("seed: 1", "layout: {swarms: [{row: 1}]}", 1, "layout.swarms[0].row", ["did you mean rows?"]),
    ("seed: 1", "overwrite: true", 1, "overwrite", ["unknown key"]),
    # unknown names of things
    ("- flatten", "- flaten", 6, "model.layers[1]", ["unknown layer 'flaten'", "did you mean flatten?"]),
    ("conv2d: {", "conv3d: {", 5, "model.layers[0].conv3d", ["unknown layer 'conv3d'", "did you mean conv2d?"]),
    ("optimizer: adam", "optimizer: adm", 12, "train.optimizer", ["unknown optimizer 'adm'", "did you mean adam?"]),
    ("optimizer: adam", "optimizer: zzz", 12, "train.optimizer", ["possible: sgd, adagrad, rmsprop, adam, adamw"]),
    ("optimizer: adam", "schedule: cosin", 12, "train.schedule", ["unknown schedule", "did you mean cosine?"]),
    ("loss: cross_entropy", "loss: crossentropy", 9, "model.loss", ["unknown loss", "did you mean cross_entropy?"]),
    ("name: digits", "name: digit", 2, "data.name", ["one of digits, mnist", "did you mean digits?"]),
    # values that are not to be had
    ("seed: 1", "exchange: gossip", 1, "exchange", ["must be allreduce", "not gossip"]),
    ("seed: 1", "exchange: {gossip: {}}", 1, "exchange", ["must be allreduce", "not a mapping"]),
    ("seed: 1", "pipeline: async", 1, "pipeline", ["one of 1f1b, gpipe", "not async"]),
    ("seed: 1", "device: gpu", 1, "device", ["one of auto, cpu"]),
    ("seed: 1", "dtype: float16", 1, "dtype", ["one of float32, float64"]),
    ("seed: 1", "layout: layer", 1, "layout", ["layers, auto or a mapping with replicas and swarms"]),
    ("name: digits", "name: digits, partition: disjoint", 2, "data.partition", ["must be shared"]),
    ("name: digits", "name: digits, augment: [flop]", 2, "data.augment[0]", ["one of flip, crop"]),
    # wrong types
    ("epochs: 3", "epochs: yes", 11, "train.epochs", ["a whole number", "'yes'"]),
    ("epochs: 3", "epochs: 3.0", 11, "train.epochs", ["a whole number", "3.0"]),
    ("epochs: 3", "epochs: true", 11, "train.epochs", ["a whole number", "true"]),
    ("epochs: 3", "batch_size:", 11, "train.batch_size", ["a whole number", "nothing"]),
    ("seed: 1", "trace: 'on'", 1, "trace", ["true or false", "'on'"]),
    ("seed: 1", "output: 7", 1, "output", ["a text", "quotes"]),
    ("dropout: 0.25", "dropout: much", 7, "model.layers[2].dropout", ["a number", "'much'"]),
    ("kernel: 3", "kernel: x", 5, "model.layers[0].conv2d.kernel", ["a whole number or two numbers", "'x'"]),
    ("kernel: 3", "kernel: [3]", 5, "model.layers[0].conv2d.kernel", ["a whole number or two numbers"]),
    ("kernel: 3", "kernel: [3, 3, 3]", 5, "model.layers[0].conv2d.kernel", ["a whole number or two numbers"]),
    ("kernel: 3", "kernel: [3, a]", 5, "model.layers[0].conv2d.kernel[1]", ["a whole number", "'a'"]),
    ("{name: digits}", "digits", 2, "data", ["a mapping", "'digits'"]),
    ("{name: digits}", "{name: digits, augment: flip}", 2, "data.augment", ["a list", "'flip'"]),
    ("optimizer: adam", "optimizer: [adam]", 12, "train.optimizer", ["name of a optimizer", "a list"]),
    ("optimizer: adam", "optimizer: {adam: {}, sgd: {}}", 12, "train.optimizer", ["one optimizer", "adam and sgd"]),
    ("optimizer: adam", "optimizer: {adam: {betas: [1]}}", 12, "train.optimizer.adam.betas", ["two numbers"]),
    # what is missing
    ("filters: 8, ", "", 5, "model.layers[0].conv2d.filters", ["is missing"]),
    ("data: {name: digits}", "data: {}", 2, "data.name", ["is missing"]),
    ("data: {name: digits}\n", "", 1, "data", ["is missing"]),
    ("{name: digits}", "{name: mnist}", 2, "data.root", ["mnist needs the folder"]),
    ("{name: digits}", "{name: hdf5}", 2, "data.root", ["hdf5 needs the file"]),
    ("- linear: 10", "- residual: {layers: [{linear: {unit: 3}}]}", 8,
     "model.layers[3].residual.layers[0].linear.unit", ["did you mean units?"]),
    ("- linear: 10", "- residual: {layers: [relu]}", 8, "model.layers[3].residual.layers", ["no layer with weights"]),
    ("- linear: 10", "- residual: {layers: []}", 8, "model.layers[3].residual.layers", ["must not be empty"]),
    ("- linear: 10", "- residual: {layers: [relu], shortcut: [lineer]}", 8,
     "model.layers[3].residual.shortcut[0]", ["did you mean linear?"]),
    # ranges
    ("seed: 1", "seed: -1", 1, "seed", ["at least 0", "not -1"]),
    ("epochs: 3", "epochs: 0", 11, "train.epochs", ["at least 1", "not 0"]),
    ("epochs: 3", "steps: -1", 11, "train.steps", ["at least 0"]),
    ("epochs: 3", "batch_size: 0", 11, "train.batch_size", ["at least 1"]),
    ("epochs: 3", "micro_batches: many", 11, "train.micro_batches", ["or auto", "many"]),
    ("epochs: 3", "micro_batches: 200", 11, "train.micro_batches", ["200 pieces", "128 rows"]),
    ("epochs: 3", "micro_batches: 0", 11, "train.micro_batches", ["at least 1"]),
    ("epochs: 3", "clip_norm: 0", 11, "train.clip_norm", ["more than 0"]),
    ("epochs: 3", "report_every: 0", 11, "train.report_every", ["at least 1"]),
    ("epochs: 3", "evaluate_every: 0", 11, "train.evaluate_every", ["at least 1"]),
    ("epochs: 3", "stop_at: {accuracy: 80}", 11, "train.stop_at.accuracy", ["at most 1"]),
    ("name: digits", "name: digits, validation: 1.0", 2, "data.validation", ["less than 1"]),
    ("dropout: 0.25", "dropout: 1.0", 7, "model.layers[2].dropout", ["at least 0 and less than 1", "not 1.0"]),
    ("filters: 8", "filters: 0", 5, "model.layers[0].conv2d.filters", ["at least 1"]),
    ("kernel: 3", "stride: [1, 0]", 5, "model.layers[0].conv2d.stride", ["at least 1"]),
    ("linear: 10", "linear: 0", 8, "model.layers[3].linear", ["at least 1"]),
    ("linear: 10", "linear: {units: 10, name: a/b}", 8, "model.layers[3].linear.name", ["begin with a letter"]),
    ("loss: cross_entropy", "loss: {cross_entropy: 1.0}", 9, "model.loss.cross_entropy", ["less than 1"]),
    ("optimizer: adam", "optimizer: {adam: {lr: 0}}", 12, "train.optimizer.adam.lr", ["more than 0"]),
    ("optimizer: adam", "optimizer: {adam: {betas: [0.9, 1]}}", 12, "train.optimizer.adam.betas", ["less than 1"]),
    ("optimizer: adam", "optimizer: {sgd: {nesterov: true}}", 12, "train.optimizer.sgd.nesterov", ["momentum"]),
    ("optimizer: adam", "optimizer: {rmsprop: {alpha: -1}}", 12, "train.optimizer.rmsprop.alpha", ["at least 0"]),
    ("optimizer: adam", "schedule: {step: 0}", 12, "train.schedule.step", ["at least 1"]),
    ("optimizer: adam", "schedule: {cosine: {warmup_steps: -1}}", 12,
     "train.schedule.cosine.warmup_steps", ["at least 0"]),
    ("seed: 1", "layout: {swarms: []}", 1, "layout.swarms", ["must not be empty"]),
    ("seed: 1", "layout: {replicas: 0, swarms: [{}]}", 1, "layout.replicas", ["at least 1"]),
    # what does not go together
    ("epochs: 3", "epochs: 3\n  steps: 5", 12, "train.steps", ["cannot both be given"]),
    ("name: digits", "name: digits, root: x", 2, "data.root", ["needs no files"]),
    ("name: digits", "name: digits, rows: 5", 2, "data.rows", ["only for synthetic"]),
    ("name: digits", "name: digits, transposed: true", 2, "data.transposed", ["only for letters"]),
    ("name: digits", "name: digits, augment: [flip, flip]", 2, "data.augment", ["twice"]),
    ("name: digits", "name: digits, std: [1, 0]", 2, "data.std", ["more than 0"]),
    ("name: digits", "name: digits, mean: []", 2, "data.mean", ["must not be empty"]),
    ("- linear: 10", "- linear: {units: 10, name: a}\n    - linear: {units: 10, name: a}", 9,
     "model.layers[4].linear.name", ["two layers are called a"]),
    # YAML itself
    ("epochs: 3", "epochs: 3\n  epochs: 4", 12, "train.epochs", ["given twice", "line 11"]),
    ("seed: 1", "seed: [1", 2, None, ["not valid YAML"]),
    ("seed: 1", "seed: !!python/name:os.system 1", 1, "seed", ["tag"]),
    ("seed: 1", "1: 1", 1, None, ["a key must be a name", "1"]),
    ("seed: 1", "seed: 1e999", 1, "seed", ["1e999"]),
    ("seed: 1", "seed: &a [*a]", 1, "seed[0]", ["contains itself"]),
    ("seed: 1", "seed: \x07", 1, None, ["U+0007"]),
    ("seed: 1", "--- a\n--- b", 2, None, ["not valid YAML"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), MISTAKES, ids=[f"{m[1]}"[:40] for m in MISTAKES])
def test_a_mistake_is_told_with_file_line_and_key(
    old: str, new: str, line: int, key: str | None, words: list[str]
) -> None:
    error = told(edited(old, new))
    assert (error.file, error.line, error.key) == ("f.yaml", line, key)
    assert str(error).startswith(f"f.yaml:{line}: " + (f"{key}: " if key else ""))
    for word in words:
        assert word in str(error)
    assert "more mistake" not in str(error)


def test_no_layer_with_weights() -> None:
    error = told("data: {name: digits}\nmodel:\n  layers: [flatten]\n")
    assert (error.key, error.line) == ("model.layers", 3)
    assert "add a linear, conv2d or residual layer" in str(error)


def test_several_mistakes_tell_the_first_in_the_file_and_how_many_more() -> None:
    text = edited("epochs: 3", "epochs: x\n  stepz: 1\n  clip_norm: -1").replace("filters", "filterz")
    error = told(text)
    assert error.line == 5
    assert str(error).endswith("(and 3 more mistakes)")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("# nothing\n", "is empty"), ("just words", "wants a mapping"), ("- a\n- b", "wants a mapping")],
)
def test_a_text_that_is_no_configuration(text: str, words: str) -> None:
    error = told(text)
    assert str(error).startswith("f.yaml")
    assert words in str(error)


def test_deep_nesting_and_alias_bombs_are_refused() -> None:
    assert "too deeply" in str(told("a: " + "[" * 20_000))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "more than 100000 values" in str(told(bomb))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(BASE)
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # für\n".encode("latin-1"))
    cases = {
        "digitz.yaml": "there is no such file; did you mean",
        "none/x.yaml": "there is no such file",
        ".": "is a folder",
        "latin.yaml": "not a text in UTF-8 (byte 11)",
        "digits.yaml/x": "cannot be read",
        "a\0b": "cannot be read",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError) as caught:
            config.load(str(tmp_path / name))
        assert words in str(caught.value)
        assert caught.value.file == str(tmp_path / name)


def test_yaml_traps() -> None:
    made = loads(edited("optimizer: adam", "optimizer: {adam: {lr: 1e-3, betas: [0, 0.5]}}\n  clip_norm: 1"))
    assert made.train.optimizer == specs.Adam(lr=0.001, betas=(0.0, 0.5))
    assert made.train.clip_norm == 1.0
    assert isinstance(made.train.clip_norm, float)
    assert loads(edited("seed: 1", "output: no")).output == "no"
    assert loads(edited("seed: 1", "output: 2024-01-01")).output == "2024-01-01"
    assert "'010'" in str(told(edited("epochs: 3", "epochs: 010")))
    assert "\ufeff" + BASE != BASE
    assert config.loads("\ufeff" + BASE, "f").seed == 1


def test_short_and_long_forms_mean_the_same() -> None:
    long = BASE.replace("dropout: 0.25", "dropout: {rate: 0.25}").replace("linear: 10", "linear: {units: 10}")
    assert loads(long.replace("- flatten", "- flatten: {}")) == loads()
    assert loads().model.layers == (specs.Conv2d(8, 3), specs.Flatten(), specs.Dropout(0.25), specs.Linear(10))


def test_defaults() -> None:
    made = config.loads("data: {name: synthetic}\nmodel: {layers: [{linear: 2}]}", "x.yaml")
    train = made.train
    assert (train.epochs, train.steps, train.batch_size, train.micro_batches) == (10, None, 128, "auto")
    assert (train.optimizer, train.schedule, train.report_every) == (specs.Adam(), specs.Constant(), 50)
    assert (made.data.rows, made.data.test_rows, made.data.shape, made.data.classes) == (10_000, 1_000, (28, 28, 1), 10)
    assert (made.layout, made.pipeline, made.exchange, made.trace) == ("layers", "1f1b", "allreduce", False)


def test_output_is_named_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BASE)
    assert config.load(str(tmp_path / "mine.yaml")).output == "runs/mine"
    assert config.load(str(tmp_path / "mine.yaml"), ["output=elsewhere"]).output == "elsewhere"
    assert config.load(None).output == "runs/digits"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loads().train.batch_size = 3  # type: ignore[misc]


# ---- --set ----------------------------------------------------------------------------------------------------------


def test_set_values() -> None:
    made = loads(BASE, "model.layers.0.conv2d.filters=16", "model.layers[3].linear.units=12", "train.clip_norm=1e1")
    assert made.model.layers[0] == specs.Conv2d(16, 3)
    assert made.model.layers[3] == specs.Linear(12)
    assert made.train.clip_norm == 10.0
    assert loads(BASE, "train.stop_at.accuracy=0.9").train.stop_at is not None
    assert loads(BASE, "train={steps: 3, batch_size: 8}").train.steps == 3
    assert loads(BASE, "model.layers.1={linear: 3}").model.layers[1] == specs.Linear(3)
    assert loads(BASE, "seed=1", "seed=2").seed == 2


def test_set_steps_takes_the_place_of_epochs_and_back() -> None:
    assert (loads(BASE, "train.steps=3").train.steps, loads(BASE, "train.steps=3").train.epochs) == (3, None)
    back = loads(edited("epochs: 3", "steps: 5"), "train.epochs=2").train
    assert (back.epochs, back.steps) == (2, None)
    assert "cannot both" in str(told(BASE, "train.steps=3", "train.epochs=2"))


def test_set_options_of_layers_and_optimizers() -> None:
    assert loads(BASE, "train.optimizer=sgd").train.optimizer == specs.Sgd()
    assert loads(BASE, "train.optimizer.sgd.lr=0.1").train.optimizer == specs.Sgd(lr=0.1)
    text = edited("optimizer: adam", "optimizer: {adam: {eps: 1e-5}}")
    assert loads(text, "train.optimizer.adam.lr=0.1").train.optimizer == specs.Adam(lr=0.1, eps=1e-5)
    assert loads(BASE, "model.layers.2.dropout.rate=0.1").model.layers[2] == specs.Dropout(0.1)
    assert loads(BASE, "model.layers.2.dropout.name=d").model.layers[2] == specs.Dropout(0.25, name="d")
    assert loads(BASE, "model.layers.2.max_pool2d.stride=1").model.layers[2] == specs.MaxPool2d(stride=1)
    assert loads(BASE, "model.loss.cross_entropy.label_smoothing=0.1").model.loss == specs.CrossEntropy(0.1)
    made = loads(BASE, "layout.swarms=[{layers: 2, rows: 3}]", "layout.replicas=2")
    assert made.layout == Layout(replicas=2, swarms=(Swarm(layers=2, rows=3),))


def test_set_changes_one_place_of_a_shared_anchor() -> None:
    text = edited("- flatten", "- &r {residual: {layers: [{linear: 8}]}}\n    - *r")
    made = loads(text, "model.layers.2.residual.layers.0.linear.units=9")
    assert made.model.layers[1] == specs.Residual((specs.Linear(8),))
    assert made.model.layers[2] == specs.Residual((specs.Linear(9),))


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("trian.steps=3", "trian", "did you mean train?"),
        ("train.batch_size=x", "train.batch_size", "a whole number"),
        ("train.optimizer.sgd.lr=-1", "train.optimizer.sgd.lr", "more than 0"),
        ("train.optimizer.sgdd.lr=1", "train.optimizer.sgdd", "did you mean sgd?"),
        ("model.layers.9.dropout=2", "model.layers", "4 entries"),
        ("model.layers.x=2", "model.layers", "a position is wanted"),
        ("seed.x=2", "seed", "nothing called 'x'"),
        ("train.steps=[", None, "not valid YAML"),
        ("train.steps", None, "wants KEY=VALUE"),
        ("=3", None, "wants KEY=VALUE"),
        ("train..steps=3", None, "wants KEY=VALUE"),
        ("3=3", None, "nothing called 3"),
    ],
)
def test_a_mistake_in_set_names_the_set(override: str, key: str | None, words: str) -> None:
    error = told(BASE, override)
    assert error.file == f"--set {override}"
    assert error.key == key
    assert words in str(error)


# ---- what is shipped ------------------------------------------------------------------------------------------------


def test_all_are_there() -> None:
    assert {p.stem for p in CONFIGS} >= {"digits", "mnist", "mnist_wide", "cifar", "cifar_resnet", "letters"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    made = config.load(str(path))
    assert made.output == f"runs/{path.stem}"
    assert config.loads(config.to_yaml(made), "again.yaml") == made


def test_the_default_is_the_digits_file() -> None:
    digits = next(p for p in CONFIGS if p.stem == "digits")
    assert digits.read_text() == config.DEFAULT
    assert config.load(None) == config.load(str(digits))


def test_the_resnet_has_the_layers_of_the_paper() -> None:
    layers = config.load(str(next(p for p in CONFIGS if p.stem == "cifar_resnet"))).model.layers
    blocks = [layer for layer in layers if isinstance(layer, specs.Residual)]
    filters = [inner.filters for b in blocks for inner in b.layers if isinstance(inner, specs.Conv2d)]
    assert filters == [16] * 6 + [32] * 6 + [64] * 6
    assert sum(isinstance(layer, specs.Linear | specs.Conv2d) for layer in layers) + len(filters) == 20
    assert [len(b.shortcut) for b in blocks] == [0, 0, 0, 2, 0, 0, 2, 0, 0]


def test_reading_loads_neither_numpy_nor_mpi() -> None:
    code = "import sys, nettorrent_mpi.app.config; sys.exit(bool({'numpy', 'mpi4py', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0


# ---- round trip -----------------------------------------------------------------------------------------------------


def unit(low: float = 0.0) -> st.SearchStrategy[float]:
    return st.floats(low, 1.0, exclude_max=True)


COUNT = st.integers(1, 10**6)
POSITIVE = st.floats(0, 1e300, exclude_min=True)
TWO = st.one_of(COUNT, st.tuples(COUNT, COUNT))
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
ACTIVATION = st.sampled_from([None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu"])
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufeff\ufffe\uffff"), min_size=1)

LAYER = st.one_of(
    st.builds(specs.Linear, COUNT, ACTIVATION, st.booleans()),
    st.builds(specs.Conv2d, COUNT, TWO, TWO, st.sampled_from(["same", "valid"]), ACTIVATION, st.booleans()),
    st.builds(specs.MaxPool2d, TWO, st.none() | TWO),
    st.builds(specs.AvgPool2d, TWO, st.none() | TWO),
    st.builds(specs.Dropout, unit()),
    st.builds(specs.BatchNorm, unit(), POSITIVE),
    st.builds(specs.LayerNorm, POSITIVE),
    st.builds(specs.LeakyRelu, st.floats(-1e300, 1e300)),
    st.sampled_from(
        [specs.Flatten(), specs.Relu(), specs.Gelu(), specs.GlobalAvgPool2d(), specs.Tanh(), specs.Sigmoid()]
    ),
)
RESIDUAL = st.builds(
    specs.Residual,
    st.lists(LAYER, max_size=2).map(lambda layers: (*layers, specs.Conv2d(4))),
    st.lists(LAYER, max_size=2).map(tuple),
)
NETWORK = st.builds(
    lambda layers, name: (*layers, specs.Linear(10, name=name)),
    st.lists(LAYER | RESIDUAL, max_size=4),
    st.none() | NAMES,
)
OPTIMIZER = st.one_of(
    st.builds(specs.Sgd, POSITIVE, unit(0.1), st.just(0.0), st.booleans(), POSITIVE),
    st.builds(specs.Adam, POSITIVE, st.tuples(unit(), unit()), POSITIVE),
    st.builds(specs.AdamW, POSITIVE, st.tuples(unit(), unit()), POSITIVE),
    st.builds(specs.Rmsprop, POSITIVE, unit(), POSITIVE, unit(), st.booleans()),
    st.builds(specs.Adagrad, POSITIVE, POSITIVE, POSITIVE),
)
SCHEDULE = st.one_of(
    st.builds(specs.Constant, st.integers(0, 9)),
    st.builds(specs.Step, COUNT, POSITIVE),
    st.builds(specs.Exponential, POSITIVE),
    st.builds(specs.Cosine, st.floats(0, 1), st.integers(0, 9)),
)
SCALING = st.none() | POSITIVE | st.lists(POSITIVE, min_size=1, max_size=3)
DATA = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["mnist", "letters", "cifar10", "hdf5"]), "root": TEXT},
                          optional={"validation": unit(), "augment": st.sampled_from([["flip"], ["flip", "crop"]]),
                                    "mean": SCALING, "std": SCALING}),
    st.fixed_dictionaries({"name": st.just("synthetic")},
                          optional={"rows": COUNT, "shape": st.lists(COUNT, min_size=1, max_size=3)}),
)  # fmt: skip
SWARMS = st.lists(
    st.fixed_dictionaries({}, optional={"layers": COUNT, "rows": COUNT, "cols": COUNT}), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(
    data=DATA,
    layers=NETWORK,
    loss=st.sampled_from([specs.CrossEntropy(), specs.CrossEntropy(0.5), specs.MeanSquaredError()]),
    length=st.sampled_from(["epochs", "steps"]),
    train=st.fixed_dictionaries(
        {"batch_size": st.integers(4, 10**6), "optimizer": OPTIMIZER, "schedule": SCHEDULE},
        optional={"clip_norm": POSITIVE, "stop_at": st.just({"accuracy": 0.5}), "report_every": COUNT},
    ),
    layout=st.sampled_from(["layers", "auto"])
    | st.fixed_dictionaries({"swarms": SWARMS}, optional={"replicas": COUNT}),
    output=TEXT,
    seed=st.integers(0, 2**80),
)
def test_what_is_written_reads_back_equal(data, layers, loss, length, train, layout, output, seed) -> None:  # type: ignore[no-untyped-def]
    made = config.from_plain(
        {
            "seed": seed,
            "data": data,
            "model": {"layers": config.plain(layers), "loss": config.plain(loss)},
            "train": {length: 7, **config.plain(train)},
            "layout": layout,
            "output": output,
        }
    )
    assert made.model.layers == layers
    assert made.train.optimizer == train["optimizer"]
    again = config.loads(config.to_yaml(made), "again.yaml")
    assert again == made
    assert config.from_plain(config.to_plain(made)) == made
    assert config.digest(again) == config.digest(made)


def test_the_digest_tells_configurations_apart_but_not_outputs() -> None:
    assert config.digest(loads(BASE, "output=elsewhere")) == config.digest(loads())
    changes = ["seed=2", "train.batch_size=64", "model.layers.2.dropout=0.3", "layout=auto", "train.optimizer=sgd"]
    digests = {config.digest(loads(BASE, change)) for change in changes} | {config.digest(loads())}
    assert len(digests) == len(changes) + 1


def test_every_option_of_every_spec_is_accepted() -> None:
    """The dataclasses decide what may be asked for: each with all of its options set comes back as it was."""
    for kinds, at in (
        (specs.OPTIMIZERS, "train.optimizer"),
        (specs.SCHEDULES, "train.schedule"),
        (specs.LOSSES, "model.loss"),
    ):
        for kind, spec in kinds.items():
            required = {"every": 3, "factor": 0.5}
            made = spec(**{f.name: required[f.name] for f in fields(spec) if f.name in required and kind != "constant"})
            section, name = at.split(".")
            read = getattr(getattr(loads(BASE, f"{at}={config.plain(made)}"), section), name)
            assert read == made
