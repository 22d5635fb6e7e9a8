"""The configuration: what is accepted, what is said of every mistake, and that writing and reading are inverses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.config import reading as config
from nettorrent_mpi.config import translation, writing
from nettorrent_mpi.config.default import DEFAULT
from nettorrent_mpi.config.mistakes import Mistake
from nettorrent_mpi.config.reading import Config, Layout, Swarm
from nettorrent_mpi.config.settings import configure
from nettorrent_mpi.config.written import parse
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.data_specs import DATASETS
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


def told(text: str, *overrides: str, lines: int = 1) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loads(text, *overrides)
    assert str(caught.value).count("\n") == lines - 1
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
    ("seed: 1", "checkpoint: {every_step: 5}", 1, "checkpoint.every_step", ["did you mean every_steps?"]),
    ("seed: 1", "checkpoint: {zzz: 5}", 1, "checkpoint.zzz", ["possible: every_steps, every_seconds"]),
    ("seed: 1", "every_seconds: 5", 1, "every_seconds", ["did you mean checkpoint.every_seconds?"]),
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
    ("seed: 1", "exchange: gosip", 1, "exchange", ["unknown exchange 'gosip'", "did you mean gossip?"]),
    ("seed: 1", "redundancy: off", 1, "redundancy", ["did you mean none?"]),
    ("seed: 1", "redundancy: {buddy: {every_steps: 0}}", 1, "redundancy.buddy.every_steps", ["must be at least 1"]),
    ("seed: 1", "exchange: zzz", 1, "exchange", ["possible: allreduce, none, gossip, elite"]),
    ("seed: 1", "exchange:", 1, "exchange", ["the name of an exchange", "nothing"]),
    ("seed: 1", "exchange: {allreduce: 1}", 1, "exchange.allreduce", ["allreduce has no options"]),
    ("seed: 1", "exchange: {none: {every: 1}}", 1, "exchange.none.every", ["unknown key; it has no options"]),
    ("seed: 1", "pipeline: asynk", 1, "pipeline", ["unknown pipeline 'asynk'", "did you mean async?"]),
    ("seed: 1", "pipeline: 4", 1, "pipeline", ["the name of a pipeline", "not 4"]),
    ("seed: 1", "pipeline: {gpipe: {x: 1}}", 1, "pipeline.gpipe.x", ["it has no options"]),
    ("seed: 1", "pipeline: {async: {staleness: true}}", 1, "pipeline.async.staleness", ["staleness_aware?"]),
    ("seed: 1", "pipeline: {async: 1}", 1, "pipeline.async", ["true or false"]),
    ("seed: 1", "device: tpu", 1, "device", ["one of auto, cpu, gpu", "there are cpu and, of NVIDIA, gpu"]),
    ("seed: 1", "dtype: tf32\ndevice: cpu", 1, "dtype", ["tf32 needs device: gpu"]),
    ("seed: 1", "dtype: tf32\ndevice: cpu", 1, "dtype", ["tf32 needs device: gpu"]),
    ("seed: 1", "kernels: blas", 1, "kernels", ["one of auto, fastest, numpy"]),
    ("seed: 1", "dtype: float16", 1, "dtype", ["one of float32, float64, tf32, bfloat16"]),
    ("seed: 1", "layout: layer", 1, "layout", ["layers, auto or a mapping with replicas, swarms or both"]),
    ("seed: 1", "watchdog: off", 1, "watchdog", ["none or a mapping with report, end or both"]),
    ("seed: 1", "watchdog: {ent: 3}", 1, "watchdog.ent", ["did you mean end?"]),
    ("seed: 1", "watchdog: {end: 30}", 1, "watchdog.end", ["30 s, and the report only comes after 60 s"]),
    ("seed: 1", "layout: {replica: 2}", 1, "layout.replica", ["did you mean replicas?"]),
    ("name: digits", "name: digits, partition: split", 2, "data.partition", ["one of shared, disjoint", "not split"]),
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
    ("optimizer: adam", "optimizer: [adam]", 12, "train.optimizer", ["name of an optimizer", "a list"]),
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
    *(("loss: cross_entropy", f"loss: {{cross_entropy: {{class_weights: {value}}}}}", 9,
       "model.loss.cross_entropy.class_weights", [text]) for value, text in (
        ("[1, -2, 1]", "must be at least 0, not -2"), ("[0, 0, 0]", "above 0"),
        ("[]", "above 0"), ("balance", "balanced"), ("3", "a list"))),
    ("optimizer: adam", "optimizer: {adam: {lr: 0}}", 12, "train.optimizer.adam.lr", ["more than 0"]),
    ("optimizer: adam", "optimizer: {adam: {betas: [0.9, 1]}}", 12, "train.optimizer.adam.betas", ["less than 1"]),
    ("optimizer: adam", "optimizer: {sgd: {nesterov: true}}", 12, "train.optimizer.sgd.nesterov", ["momentum"]),
    ("optimizer: adam", "optimizer: {rmsprop: {alpha: -1}}", 12, "train.optimizer.rmsprop.alpha", ["at least 0"]),
    ("optimizer: adam", "schedule: {step: 0}", 12, "train.schedule.step", ["at least 1"]),
    ("optimizer: adam", "schedule: {step: {every: 3}}", 12, "train.schedule.step.every",
     ["unknown key; did you mean every_epochs or every_steps?"]),
    ("optimizer: adam", "schedule: step", 12, "train.schedule", ["give one of every_epochs and every_steps"]),
    ("optimizer: adam", "schedule: {step: {every_epochs: 2, every_steps: 9}}", 12, "train.schedule.step", ["give one"]),
    ("optimizer: adam", "schedule: {cosine: {warmup_steps: -1}}", 12,
     "train.schedule.cosine.warmup_steps", ["at least 0"]),
    ("seed: 1", "layout: {swarms: []}", 1, "layout.swarms", ["must not be empty"]),
    ("seed: 1", "layout: {replicas: 0, swarms: [{}]}", 1, "layout.replicas", ["at least 1"]),
    # ranges of exchanges
    ("seed: 1", "exchange: {elite: 0}", 1, "exchange.elite", ["at least 1"]),
    ("seed: 1", "exchange: {elite: {metric: test_loss}}", 1, "exchange.elite.metric",
     ["one of validation_loss, validation_accuracy"]),
    ("seed: 1", "exchange: {elite: {mode: worst}}", 1, "exchange.elite.mode", ["one of best, tournament"]),
    # what does not go together
    ("epochs: 3", "epochs: 3\n  steps: 5", 12, "train.steps", ["cannot both be given"]),
    ("seed: 1", "exchange: elite", 2, "data.validation", ["never on the test set", "add data.validation: 0.1"]),
    ("name: digits}", "name: digits, validation: 0}\nexchange: elite", 2, "data.validation", ["elite needs it"]),
    ("optimizer: adam", "clip_norm: 1\npipeline: async", 12, "train.clip_norm", ["pipeline async", "never there"]),
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
    ("seed: 1", "1: 1", 1, "1", ["a key must be a name", "1"]),
    ("seed: 1", "seed: 1e999", 1, "seed", ["1e999"]),
    ("seed: 1", "seed: &a [*a]", 1, "seed[0]", ["contains itself"]),
    ("seed: 1", "seed: \x07", 1, None, ["U+0007"]),
    ("seed: 1", "--- a\n--- b", 2, None, ["not valid YAML"]),
]  # fmt: skip


# (options of gossip as YAML, key below exchange.gossip, words of the message)
GOSSIP = [
    ("pairing: rnig", "pairing", ["one of ring, exponential, hypercube", "did you mean ring?"]),
    ("paring: ring", "paring", ["unknown key", "did you mean pairing?"]),
    ("every: 0", "every", ["at least 1", "not 0"]),
    ("every: 1.5", "every", ["a whole number", "1.5"]),
    ("exact_every: 0", "exact_every", ["at least 1"]),
    ("probability: 0", "probability", ["more than 0 and at most 1", "not 0"]),
    ("probability: 1.1", "probability", ["more than 0 and at most 1", "not 1.1"]),
    ("part: 0", "part", ["more than 0 and at most 1"]),
    ("part: 1.5", "part", ["more than 0 and at most 1"]),
    ("part: all", "part", ["a number or auto", "'all'"]),
    ("part: auot", "part", ["a number or auto", "did you mean auto?"]),
    ("deadline: 0", "deadline", ["more than 0"]),
    ("deadline: -3", "deadline", ["more than 0"]),
    ("deadline: never", "deadline", ["a number or one of auto, none", "'never'"]),
    ("deadline: autoo", "deadline", ["did you mean auto?"]),
    ("divergence_threshold: -1", "divergence_threshold", ["at least 0"]),
    ("overlap: 1", "overlap", ["true or false"]),
    ("mix: {constant: 1.5}", "mix.constant", ["between 0 and 1", "not 1.5"]),
    ("mix: {constant: {value: -0.5}}", "mix.constant.value", ["between 0 and 1"]),
    ("mix: {linear: {start: 2}}", "mix.linear.start", ["between 0 and 1"]),
    ("mix: {linear: {end: -1}}", "mix.linear.end", ["between 0 and 1"]),
    ("mix: {linear: {target: 0}}", "mix.linear.target", ["at least 1"]),
    ("mix: {linear: {target: 0.5}}", "mix.linear.target", ["a whole number"]),
    ("mix: {linear: {unit: 1}}", "mix.linear.unit", ["possible: start, end, target"]),  # not those of the layer linear
    ("mix: {constant: {warmup_steps: 1}}", "mix.constant.warmup_steps", ["unknown key; possible: value"]),
    ("mix: {loss_divergence: 0}", "mix.loss_divergence", ["more than 0"]),
    ("mix: {loss_divergence: {target: -1}}", "mix.loss_divergence.target", ["more than 0"]),
    ("mix: clok", "mix", ["unknown mix 'clok'", "did you mean clock?"]),
    ("mix: {clok: {}}", "mix.clok", ["unknown mix 'clok'", "did you mean clock?"]),
    ("mix: {clock: 1}", "mix.clock", ["clock has no options"]),
    ("mix: 3", "mix", ["the name of a mix", "not 3"]),
    ("mix: {clock: {}, loss: {}}", "mix", ["one mix", "clock and loss"]),
    ("compress: {topk: 0}", "compress.topk", ["more than 0 and less than 1"]),
    ("compress: {topk: 1}", "compress.topk", ["more than 0 and less than 1"]),
    ("compress: {topk: {fraction: 1.5}}", "compress.topk.fraction", ["more than 0 and less than 1"]),
    ("compress: {topk: {fractoin: 0.5}}", "compress.topk.fractoin", ["unknown key", "did you mean fraction?"]),
    ("compress: top", "compress", ["unknown compression 'top'", "did you mean topk?"]),
    ("compress: {topk: x}", "compress.topk", ["a number", "'x'"]),
    ("compress: sign, gamma: 0", "gamma", ["more than 0 and at most 1"]),
    ("compress: sign, gamma: 1.5", "gamma", ["more than 0 and at most 1"]),
    ("gamma: 0.5", "gamma", ["add compress"]),
    ("exact_every: 2, slow_momentum: 1", "slow_momentum", ["at least 0 and less than 1"]),
    ("slow_momentum: 0.5", "slow_momentum", ["add exact_every"]),
    ("compress: topk, mix: clock", "compress", ["topk", "leave out mix"]),
    ("compress: int8, mix: {constant: 0.5}", "compress", ["int8", "the pairing's own weights only"]),
    ("compress: float16, mix: push_sum", "compress", ["float16", "the pairing's own weights only"]),
    ("compress: sign, pairing: random", "compress", ["sign", "choose another pairing"]),
    ("compress: int8, average: [parameters, optimizer]", "compress", ["int8", "leave optimizer out of average"]),
    ("average: [optimizer]", "average", ["must hold parameters"]),
    ("average: []", "average", ["must hold parameters"]),
    ("average: [parameters, parameters]", "average", ["twice"]),
    ("average: [parameter]", "average[0]", ["one of parameters, optimizer", "did you mean parameters?"]),
    ("average: parameters", "average", ["a list", "'parameters'"]),
    ("consensus: {max: 0}", "consensus.max", ["more than 0"]),
    ("consensus: {mix: 0.1}", "consensus.mix", ["unknown key", "did you mean max?"]),
    ("consensus: 0.1", "consensus", ["a mapping", "0.1"]),
]


@pytest.mark.parametrize(("options", "key", "words"), GOSSIP, ids=[row[0] for row in GOSSIP])
def test_a_mistake_in_gossip_is_told_with_line_and_key(options: str, key: str, words: list[str]) -> None:
    texts = (edited("seed: 1", f"seed: 1\nexchange: {{gossip: {{{options}}}}}"), BASE)
    for text, override in zip(texts, ((), (f"exchange.gossip={{{options}}}",)), strict=True):
        error = told(text, *override)
        assert error.key == f"exchange.gossip.{key}"
        assert (error.file, error.line) == ((f"--set {override[0]}", None) if override else ("f.yaml", 2))
        for word in words:
            assert word in str(error)
        assert "more mistake" not in str(error)


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


def test_several_mistakes_are_told_one_in_a_line() -> None:
    """One error lists the mistakes of values, of keys, of the text and of --set, in the order of the file."""
    text = edited("epochs: 3", "epochs: x\n  stepz: 1\n  clip_norm: -1\n  clip_norm: 1").replace("filters", "filterz")
    text = text.replace("dropout: 0.25", "dropout: 1e999").replace("linear: 10", "linear: {units: 0, initial: x}")
    error = told(text, "seed=x", "train.optimizer.sgdd.lr=1", "nowhere", lines=12)
    assert (error.file, error.line, error.key) == ("f.yaml", 5, "model.layers[0].conv2d.filterz")
    first, *others = str(error).splitlines()
    assert first == "11 mistakes"
    assert [line.split(": ")[:2] for line in others] == [
        ["  f.yaml:5", "model.layers[0].conv2d.filterz"],
        ["  f.yaml:7", "model.layers[2].dropout"],
        ["  f.yaml:8", "model.layers[3].linear.initial"],
        ["  f.yaml:8", "model.layers[3].linear.units"],
        ["  f.yaml:11", "train.epochs"],
        ["  f.yaml:12", "train.stepz"],
        ["  f.yaml:13", "train.clip_norm"],
        ["  f.yaml:14", "train.clip_norm"],
        ["  --set train.optimizer.sgdd.lr=1", "train.optimizer.sgdd"],
        ["  --set nowhere", "wants KEY=VALUE with a dotted KEY, as in --set train.batch_size=64"],
        ["  --set seed=x", "seed"],
    ]


# (what a user of another program writes, in place of what, words of the message)
TRANSLATED = [
    ("- dense: 10", "- linear: 10", "unknown layer 'dense'; did you mean linear?"),
    ("- nn.Linear: 10", "- linear: 10", "did you mean linear?"),
    ("- Dense: {units: 10}", "- linear: 10", "did you mean linear?"),
    ("- softmax", "- flatten", "leave it out: cross_entropy takes the outputs before a softmax"),
    ("- dropout2d: 0.25", "- dropout: 0.25", "write dropout, which leaves out single values"),
    ("- MaxPooling2D: 2", "- flatten", "did you mean max_pool2d?"),
    ("- BatchNorm2d", "- flatten", "did you mean batch_norm?"),
    ("- ReLU", "- flatten", "did you mean relu?"),
    ("{filters: 8, kernel_size: 3}", "{filters: 8, kernel: 3}", "did you mean kernel?"),
    ("{out_channels: 8, in_channels: 1}", "{filters: 8, kernel: 3}", "did you mean filters?"),
    ("{filters: 8, activation: softmax}", "{filters: 8, kernel: 3}", "one of relu"),
    ("loss: categorical_crossentropy", "loss: cross_entropy", "did you mean cross_entropy?"),
    ("loss: MSELoss", "loss: cross_entropy", "did you mean mean_squared_error?"),
    ("loss: BCEWithLogitsLoss", "loss: cross_entropy", "did you mean binary_cross_entropy?"),
    ("optimizer: SGD", "optimizer: adam", "did you mean sgd?"),
    ("optimizer: {adam: {learning_rate: 0.1}}", "optimizer: adam", "did you mean lr?"),
    ("learning_rate: 0.1", "optimizer: adam", "did you mean train.optimizer.adam.lr?"),
    ("optimizer: {adam: {beta_1: 0.9}}", "optimizer: adam", "did you mean betas?"),
    ("schedule: StepLR", "optimizer: adam", "did you mean step?"),
    ("schedule: {step: {step_size: 30}}", "optimizer: adam", "did you mean every"),
    ("schedule: CosineAnnealingLR", "optimizer: adam", "did you mean cosine?"),
    ("num_workers: 4", "optimizer: adam", "leave it out: mpirun -n N starts N ranks"),
    ("validation_split: 0.1", "optimizer: adam", "did you mean data.validation?"),
    ("shuffle: true", "optimizer: adam", "leave it out: the rows are shuffled anew"),
    ("device: cuda", "seed: 1", "must be one of auto, cpu, gpu, not cuda; did you mean gpu?"),
    ("device: cuda:0", "seed: 1", "write gpu: each rank takes one of the GPUs that its node has"),
    ("gpu: true", "seed: 1", "write device: gpu, or leave it out"),
    ("dtype: float16", "seed: 1", "write bfloat16: with the range"),
    ("dtype: bf16", "seed: 1", "did you mean bfloat16?"),
    ("dtype: double", "seed: 1", "did you mean float64?"),
    ("random_seed: 1", "seed: 1", "did you mean seed?"),
    ("exchange: ddp", "seed: 1", "did you mean allreduce?"),
    ("{name: fmnist}", "{name: digits}", "did you mean fashion_mnist?"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "instead_of", "words"), TRANSLATED, ids=[row[0] for row in TRANSLATED])
def test_the_words_of_other_programs_are_translated(written: str, instead_of: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(edited(instead_of, written))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"learning_rate": 0.1}, "it is an option of the optimizer: give optimizer={'adam': {'lr': ...}}"),
        ({"num_epochs": 2}, "unknown setting num_epochs; did you mean epochs?"),
        ({"shuffle": True}, "leave it out: the rows are shuffled anew in every epoch"),
        ({"loss": "mse"}, "did you mean mean_squared_error?"),
        ({"batch_size": 0, "seed": -1}, "2 mistakes\n  seed: must be at least 0, not -1\n  train.batch_size: must be"),
    ],
)
def test_settings_of_a_script_are_corrected_too(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure([specs.Linear(2)], {"name": "digits"}, setting, given=False)
    assert words in str(caught.value)


def test_every_translation_leads_to_something_that_is_there() -> None:
    """A name is a kind, an option or a key, and the first of several; all else is a sentence."""
    kinds = {"layer": specs.LAYERS, "loss": specs.LOSSES, "optimizer": specs.OPTIMIZERS, "schedule": specs.SCHEDULES,
             "exchange": choices.EXCHANGES, "data": DATASETS}  # fmt: skip
    options = {f.name for table in kinds.values() for kind in table.values() for f in fields(kind)}
    options |= {f.name for section in config._SECTIONS.values() for f in fields(section)}
    for what, words in translation._WORDS.items():
        for word, meaning in words.items():
            assert word == translation.plainly(word)
            known = kinds.get(what, {"key": options}.get(what, [meaning]))
            assert " " in meaning or any(name.split(".")[-1] in known for name in meaning.split("|")), (word, meaning)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("  epochs: 3", "\tepochs: 3", 11, "not valid YAML: there is a tab"),
        ("seed: 1", "seed:\t1", 1, "there is a tab"),
        ("  epochs: 3", "    epochs: 3\n  steps: 3", 12, "the indentation does not fit the lines above"),
        ("seed: 1", "seed:1", 1, "a space is missing after seed:"),
        ("seed: 1", "output: a: b", 1, "a text with a colon and a space in it needs quotes"),
        ("seed: 1", "seed\uff1a 1", 1, "a full-width one"),
        ("seed: 1", "output: 'a", 1, "a quote is not closed"),
        ("seed: 1", "output: @here", 1, "a text that begins with @ needs quotes"),
        ("optimizer: adam", "optimizer: {adam: {lr: 1}", 13, "a comma or a closing bracket is missing"),
        ("seed: 1", "seed\u00a0: 1", 1, "U+00A0 (no-break space)"),
        ("seed: 1", "output: \u201crun\u201d", 1, "typographic quote"),
        ("seed: 1", "output: $HOME/x", 1, "variables are not replaced"),
        ("epochs: 3", "epochs: '3'", 11, "(write 3, without quotes)"),
        ("epochs: 3", "epochs: 1,000", 11, "(write 1000)"),
        ("seed: 1", "trace: yes", 1, "(write true, without quotes)"),
        ("optimizer: adam", "optimizer: {adam: {betas: [0.9, 0.99], <<: 3}}", 12, "merge keys are not read"),
        ("    - flatten", "    flatten: {}", 6, "the indentation does not fit"),
    ],
)  # fmt: skip
def test_yaml_is_corrected_in_words(old: str, new: str, line: int, words: str) -> None:
    error = told(edited(old, new))
    assert error.line == line
    assert words in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("just words", "wants a mapping"),
        ("- a\n- b", "wants a mapping"),
        ("seed: 1 # \x85\u2028\u2029\n0o7", "f.yaml:5: not valid YAML: a key has no colon"),
    ],
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


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file; configs/ holds: cifar\.yaml, .*; `nettorrent init`"):
        config.load("unlike.yaml")
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean configs/mnist\.yaml\?$"):
        config.load("mnist.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text(BASE)
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # für\n".encode("latin-1"))
    cases = {
        "digitz.yaml": "there is no such file; did you mean",
        "none/x.yaml": "there is no such file; `nettorrent init` writes one",
        "unlike.yaml": "there is no such file; `nettorrent init` writes one",
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
    assert (made.layout, made.trace, made.data.partition) == ("layers", False, "shared")
    assert (made.pipeline, made.exchange) == (choices.OneFOneB(), choices.Allreduce())


def test_output_is_named_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BASE)
    assert config.load(str(tmp_path / "mine.yaml")).output == "runs/mine"
    assert config.load(str(tmp_path / "mine.yaml"), ["output=elsewhere"]).output == "elsewhere"
    assert config.load(None).output == "runs/digits"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
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


def test_set_options_of_exchanges_and_pipelines() -> None:
    assert loads(BASE, "exchange=gossip").exchange == choices.Gossip()
    assert loads(BASE, "exchange=none").exchange == choices.Nothing()
    assert loads(BASE, "exchange.gossip.pairing=ring").exchange == choices.Gossip("ring")
    assert loads(BASE, "data.validation=0.1", "exchange.elite.mode=tournament").exchange == choices.Elite(
        mode="tournament"
    )
    text = edited("seed: 1", "exchange: {gossip: ring}")
    assert loads(text, "exchange.gossip.every=2").exchange == choices.Gossip("ring", every=2)
    assert loads(text, "exchange.allreduce={}").exchange == choices.Allreduce()
    top = choices.Gossip("ring", compress=choices.TopK(0.1))
    for value in ("compress.topk.fraction=0.1", "compress.topk=0.1", "compress={topk: 0.1}"):
        assert loads(text, f"exchange.gossip.{value}").exchange == top
    text = edited("seed: 1", "exchange: {gossip: {mix: {linear: {start: 0.7}}, consensus: {max: 0.3}}}")
    made = loads(text, "exchange.gossip.mix.linear.target=7", "exchange.gossip.consensus.max=0.1").exchange
    assert made == choices.Gossip(mix=choices.LinearMix(0.7, target=7), consensus=choices.Consensus(0.1))
    assert loads(text, "exchange.gossip.mix.constant.value=0.5").exchange.mix == choices.ConstantMix(0.5)
    assert loads(text, "exchange.gossip.mix=clock", "exchange.gossip.consensus=null").exchange == choices.Gossip(
        mix=choices.ClockMix()
    )
    assert loads(BASE, "exchange.gossip.consensus.max=0.1").exchange.consensus == choices.Consensus(0.1)
    assert loads(BASE, "pipeline=async").pipeline == choices.Async()
    assert loads(BASE, "pipeline.async.staleness_aware=true").pipeline == choices.Async(staleness_aware=True)
    assert loads(edited("seed: 1", "pipeline: {async: true}")).pipeline == choices.Async(staleness_aware=True)
    assert loads(edited("seed: 1", "pipeline: async"), "pipeline=gpipe").pipeline == choices.Gpipe()


def test_what_goes_together() -> None:
    assert loads(BASE, "data.validation=0.1", "exchange=elite").exchange == choices.Elite()
    assert loads(BASE, "train.clip_norm=1", "pipeline=gpipe").train.clip_norm == 1
    disjoint = loads(BASE, "data.partition=disjoint")
    assert (disjoint.data.partition, disjoint.exchange) == ("disjoint", choices.Allreduce())
    for options in (
        "{compress: topk, gamma: 0.3}",
        "{mix: push_sum, average: [parameters, optimizer]}",
        "{compress: topk, mix: constant}",
        "{pairing: random, mix: push_sum, consensus: {max: 0.1}}",
        "{mix: loss}",
        "{exact_every: 5, slow_momentum: 0.5}",
        "{deadline: none, part: 1}",
        "{deadline: 2, part: auto, probability: 1}",
    ):
        assert isinstance(loads(BASE, f"exchange.gossip={options}").exchange, choices.Gossip)


def test_replicas_without_swarms() -> None:
    for made in (loads(BASE, "layout={replicas: 4}"), loads(BASE, "layout.replicas=4")):
        assert made.layout == Layout(replicas=4)
        assert "swarms" not in writing.to_plain(made)["layout"]
        assert config.loads(writing.to_yaml(made), "again.yaml") == made


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
        ("exchange.gosip.every=2", "exchange.gosip", "did you mean gossip?"),
        ("exchange.gossip.mix.linaer.start=1", "exchange.gossip.mix.linaer", "did you mean linear?"),
        ("exchange.gossip.compress.topk.fraction=2", "exchange.gossip.compress.topk.fraction", "less than 1"),
        ("pipeline.async.staleness=2", "pipeline.async.staleness", "did you mean staleness_aware?"),
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
    assert config.loads(writing.to_yaml(made), "again.yaml") == made


def test_the_default_is_the_digits_file() -> None:
    digits = next(p for p in CONFIGS if p.stem == "digits")
    assert digits.read_text() == DEFAULT
    assert config.load(None) == config.load(str(digits))


def test_the_resnet_has_the_layers_of_the_paper() -> None:
    layers = config.load(str(next(p for p in CONFIGS if p.stem == "cifar_resnet"))).model.layers
    blocks = [layer for layer in layers if isinstance(layer, specs.Residual)]
    filters = [inner.filters for b in blocks for inner in b.layers if isinstance(inner, specs.Conv2d)]
    assert filters == [16] * 6 + [32] * 6 + [64] * 6
    assert sum(isinstance(layer, specs.Linear | specs.Conv2d) for layer in layers) + len(filters) == 20
    assert [len(b.shortcut) for b in blocks] == [0, 0, 0, 2, 0, 0, 2, 0, 0]


def test_reading_loads_neither_numpy_nor_mpi() -> None:
    code = "import sys, nettorrent_mpi.config.reading; sys.exit(bool({'numpy', 'mpi4py', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0


# ---- round trip -----------------------------------------------------------------------------------------------------


def unit(low: float = 0.0) -> st.SearchStrategy[float]:
    return st.floats(low, 1.0, exclude_max=True)


COUNT = st.integers(1, 10**6)
POSITIVE = st.floats(0, 1e300, exclude_min=True)
TWO = st.one_of(COUNT, st.tuples(COUNT, COUNT))
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
ACTIVATION = st.sampled_from([None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu"])
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="$\ufeff\ufffe\uffff"), min_size=1)

LAYER = st.one_of(
    st.builds(specs.Linear, COUNT, ACTIVATION, st.booleans()),
    st.builds(specs.Conv2d, COUNT, TWO, TWO, st.sampled_from(["same", "valid"]), ACTIVATION, st.booleans()),
    st.builds(specs.MaxPool2d, TWO, st.none() | TWO),
    st.builds(specs.AvgPool2d, TWO, st.none() | TWO),
    st.builds(specs.Dropout, unit()),
    st.builds(specs.BatchNorm, unit(), POSITIVE),
    st.builds(specs.LayerNorm, POSITIVE),
    st.builds(specs.LeakyRelu, st.floats(0, 1)),
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
    st.builds(specs.Step, COUNT, st.none(), POSITIVE),
    st.builds(specs.Step, every_steps=COUNT, factor=POSITIVE),
    st.builds(specs.Exponential, POSITIVE),
    st.builds(specs.Cosine, st.floats(0, 1), st.integers(0, 9)),
)
SCALING = st.none() | POSITIVE | st.lists(POSITIVE, min_size=1, max_size=3)
DATA = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["mnist", "letters", "cifar10", "hdf5"]), "root": TEXT},
                          optional={"validation": unit(), "partition": st.sampled_from(["shared", "disjoint"]),
                                    "augment": st.sampled_from([["flip"], ["flip", "crop"]]),
                                    "mean": SCALING, "std": SCALING}),
    st.fixed_dictionaries({"name": st.just("synthetic")},
                          optional={"rows": COUNT, "shape": st.lists(st.integers(1, 1000), min_size=1, max_size=3)}),
)  # fmt: skip
ABOVE_ZERO = st.floats(0, 1, exclude_min=True)
BETWEEN = st.floats(0, 1, exclude_min=True, exclude_max=True)
PAIRING = st.sampled_from(get_args(choices.PairingKind))
AVERAGE = st.sampled_from([("parameters",), ("parameters", "optimizer"), ("optimizer", "parameters")])
MIX = st.one_of(
    st.builds(choices.ConstantMix, st.none() | st.floats(0, 1)),
    st.builds(choices.LinearMix, st.floats(0, 1), st.floats(0, 1), COUNT),
    st.builds(choices.LossDivergenceMix, POSITIVE),
    st.sampled_from([choices.ClockMix(), choices.LossMix(), choices.PushSumMix()]),
)
COMPRESS = st.builds(choices.TopK, BETWEEN) | st.sampled_from([choices.Float16(), choices.Int8(), choices.Sign()])
COMMON = {
    "every": COUNT,
    "probability": ABOVE_ZERO,
    "part": st.just("auto") | ABOVE_ZERO,
    "divergence_threshold": st.floats(0, 1e300),
    "exact_every": COUNT,
    "slow_momentum": unit(),
    "overlap": st.booleans(),
    "deadline": st.sampled_from(["auto", "none"]) | POSITIVE,
    "consensus": st.none() | st.builds(choices.Consensus, POSITIVE),
}
EXCHANGE = st.one_of(
    st.just(choices.Allreduce()),
    st.just(choices.Nothing()),
    st.builds(choices.Elite, COUNT, st.sampled_from(["best", "tournament"]), st.just("validation_accuracy")),
    st.builds(choices.Gossip, PAIRING, MIX, average=AVERAGE, **COMMON),
    st.builds(
        choices.Gossip,
        PAIRING.filter(lambda p: p != "random"),
        compress=COMPRESS,
        gamma=st.none() | ABOVE_ZERO,
        **COMMON,
    ),
)
PIPELINE = st.builds(choices.Async, st.booleans()) | st.sampled_from([choices.OneFOneB(), choices.Gpipe()])
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
    | st.fixed_dictionaries({}, optional={"swarms": SWARMS, "replicas": COUNT}),
    exchange=EXCHANGE,
    pipeline=PIPELINE,
    output=TEXT,
    seed=st.integers(0, 2**80),
)
def test_what_is_written_reads_back_equal(  # type: ignore[no-untyped-def]
    data, layers, loss, length, train, layout, exchange, pipeline, output, seed
) -> None:
    if isinstance(exchange, choices.Elite):
        data = {**data, "validation": 0.25}
    if isinstance(pipeline, choices.Async):
        train = {name: value for name, value in train.items() if name != "clip_norm"}
    made = config.from_plain(
        {
            "seed": seed,
            "data": data,
            "model": {"layers": writing.plain(layers), "loss": writing.plain(loss)},
            "train": {length: 7, **writing.plain(train)},
            "layout": layout,
            "exchange": writing.plain(exchange),
            "pipeline": writing.plain(pipeline),
            "output": output,
        }
    )
    assert (made.exchange, made.pipeline) == (exchange, pipeline)
    assert made.model.layers == layers
    assert made.train.optimizer == train["optimizer"]
    again = config.loads(writing.to_yaml(made), "again.yaml")
    assert again == made
    assert config.from_plain(writing.to_plain(made)) == made


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (specs.Sgd(lr=-0.1), "lr"),
        (specs.Sgd(lr=math.inf), "lr"),
        (specs.Sgd(nesterov=True), "nesterov"),
        (specs.Sgd(momentum=0.9, dampening=0.1, nesterov=True), "nesterov"),
        (specs.Rmsprop(alpha=1.5), "alpha"),
        (specs.Adam(betas=(0.9, 1.0)), "betas"),
        (specs.AdamW(weight_decay=math.nan), "weight_decay"),
        (specs.Adagrad(initial_accumulator=-1.0), "initial_accumulator"),
        (specs.Step(every_steps=0), "every_steps"),
        (specs.Constant(warmup_steps=-1), "warmup_steps"),
        (specs.Exponential(math.nan), "factor_per_epoch"),
        (specs.Cosine(final=-0.5), "final"),
        (specs.CrossEntropy(label_smoothing=1.5), "label_smoothing"),
        (specs.Dropout(1.0), "rate"),
        (specs.Dropout(-0.1), "rate"),
        (specs.LeakyRelu(-1.0), "slope"),
        (specs.BatchNorm(eps=0.0), "eps"),
        (specs.Residual(layers=(specs.Relu(),)), "layers"),
    ],
    ids=str,
)
def test_options_of_a_script_are_checked_as_those_of_a_file(spec: specs.Spec, option: str) -> None:
    kinds = specs.LAYERS | specs.OPTIMIZERS | specs.SCHEDULES | specs.LOSSES
    with pytest.raises(Mistake) as caught:
        parse(spec, kinds, "spec")
    assert caught.value.path == (option,)


def test_every_option_of_every_spec_is_accepted() -> None:
    """The dataclasses decide what may be asked for: each with all of its options set comes back as it was."""
    for kinds, at in (
        (specs.OPTIMIZERS, "train.optimizer"),
        (specs.SCHEDULES, "train.schedule"),
        (specs.LOSSES, "model.loss"),
        (choices.PIPELINES, "pipeline"),
        (choices.EXCHANGES, "exchange"),
        (choices.MIXES, "exchange.gossip.mix"),
        (choices.COMPRESSIONS, "exchange.gossip.compress"),
    ):
        for kind, spec in kinds.items():
            required = {"every": 3, "every_steps": 3, "factor": 0.5, "factor_per_epoch": 0.5}
            made = spec(**{f.name: required[f.name] for f in fields(spec) if f.name in required and kind != "constant"})
            read: Any = loads(BASE, f"{at}={json.dumps(writing.plain(made))}", "data.validation=0.1")
            for part in at.replace(".gossip", "").split("."):
                read = getattr(read, part)
            assert read == made
            assert type(read) is spec
