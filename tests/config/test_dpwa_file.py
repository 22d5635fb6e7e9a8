"""Files of dpwa: what is read of them, and what is said of every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from nettorrent_mpi.config.dpwa_file import DpwaFile, read_dpwa
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import (
    ClockMix,
    ConstantMix,
    Gossip,
    LinearMix,
    LossDivergenceMix,
    LossMix,
    Nothing,
)
from nettorrent_mpi.plan.specs import Spec

FILE = """\
# three workers
---
- nodes:
  - {name: a, host: localhost, port: 4001}
  - {name: b, host: localhost, port: 4002}
  - {name: c, host: node7, port: 4001}

- fetch_probability: 0.5
- timeout_ms: 1500

- interpolation: constant
- divergence_threshold: 0.3

- constant: { value: 0.25 }
- clock: 0
- loss: 0
"""
FORMER = """\
- nodes:
  - {name: a, host: localhost, port: 4001}
- pull_probability: 1
- timeout_ms: 900
- interpolation: loss_divergence
- constant: { value: 0.5 }
- linear: { start: 0.6, end: 0.1, target: 300 }
- clock: 0
- loss: 0
- loss_divergence: { target_divergence_loss: 0.4 }
"""


def read(folder: Path, text: str | bytes) -> DpwaFile:
    path = folder / "d.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dpwa(str(path))


def gossip(mix: Spec, **options: float) -> Gossip:
    return Gossip("random", mix, part=1.0, rate_factor=1.0, withhold=0.0, **options)  # type: ignore[arg-type]


def test_every_key_is_read(tmp_path: Path) -> None:
    """Those of dpwa's samples (samples/config.yaml, examples/pytorch-cifar), also before methods were removed there."""
    found = read(tmp_path, FILE)
    assert found == (gossip(ConstantMix(0.25), probability=0.5, deadline=1500.0, divergence_threshold=0.3), 3)
    found = read(tmp_path, FORMER)
    assert found == (gossip(LossDivergenceMix(0.4), probability=1.0, deadline=900.0), 1)
    methods: dict[str, Spec] = {
        "constant": ConstantMix(0.5),
        "linear": LinearMix(0.6, 0.1, 300),
        "clock": ClockMix(),
        "loss": LossMix(),
    }
    for method, mix in methods.items():
        text = FORMER.replace("interpolation: loss_divergence", f"interpolation: {method}")
        assert read(tmp_path, text).exchange == gossip(mix, deadline=900.0)


@pytest.mark.parametrize(
    ("text", "exchange"),
    [
        ("{interpolation: clock}", gossip(ClockMix())),
        ("interpolation: loss\nloss:\n", gossip(LossMix())),
        ("- interpolation: loss\n  timeout_ms: none", gossip(LossMix(), deadline="none")),  # type: ignore[arg-type]
        ("{interpolation: clock, fetch_probability: 0, timeout_ms: 5}", Nothing()),
        ("{interpolation: clock, pull_probability: 0.0}", Nothing()),
        ("{interpolation: constant, constant: {value: 1}}", gossip(ConstantMix(1.0))),
        ("{interpolation: constant, constant: {value: 0}}", gossip(ConstantMix(0.0))),
    ],
)
def test_a_mapping_and_few_keys_will_do(tmp_path: Path, text: str, exchange: Spec) -> None:
    assert read(tmp_path, text) == (exchange, None)


# (what of FILE is changed, into what, line, key, words of the message)
MISTAKES = [
    ("fetch_probability: 0.5", "fetch_probabilty: 1", 8, "fetch_probabilty", "did you mean fetch_probability?"),
    ("timeout_ms", "time_out", 9, "time_out", "unknown key; did you mean timeout_ms?"),
    ("interpolation: constant", "interpolaton: constant", 11, "interpolaton", "did you mean interpolation?"),
    ("- loss: 0", "- xyz: 0", 16, "xyz", "unknown key; possible: nodes, fetch_probability, pull_probability"),
    ("fetch_probability: 0.5", "fetch_probability: '1'", 8, "fetch_probability", "(write 1, without quotes)"),
    ("fetch_probability: 0.5", "fetch_probability: true", 8, "fetch_probability", "wants a number, not true"),
    ("fetch_probability: 0.5", "fetch_probability:", 8, "fetch_probability", "not nothing (null)"),
    ("fetch_probability: 0.5", "fetch_probability: 1.5", 8, "fetch_probability", "between 0 and 1, not 1.5"),
    ("fetch_probability: 0.5", "pull_probability: -1", 8, "pull_probability", "between 0 and 1, not -1"),
    ("fetch_probability: 0.5", "fetch_probability: 1e999", 8, "[1].fetch_probability", "not a number that can be used"),
    ("- clock: 0", "- pull_probability: 1", 15, "pull_probability", "give fetch_probability or pull_probability, not"),
    ("timeout_ms: 1500", "timeout_ms: 2s", 9, "timeout_ms", "wants a number or one of auto, none"),
    ("timeout_ms: 1500", "timeout_ms: 0", 9, "timeout_ms", "must be more than 0"),
    ("divergence_threshold: 0.3", "divergence_threshold: -1", 12, "divergence_threshold", "at least 0, not -1"),
    ("divergence_threshold: 0.3", "divergence_threshold: [1]", 12, "divergence_threshold", "wants a number"),
    ("- interpolation: constant\n", "", 3, "interpolation", "is missing; choose one of constant, clock, loss, linear"),
    (
        "interpolation: constant",
        "interpolation: clok",
        11,
        "interpolation",
        "unknown method 'clok'; did you mean clock",
    ),
    ("interpolation: constant", "interpolation: push_sum", 11, "interpolation", "unknown method 'push_sum'; possible"),
    ("interpolation: constant", "interpolation: 3", 11, "interpolation", "wants one of constant, clock, loss, linear"),
    ("interpolation: constant", "interpolation: linear", 11, "interpolation", "linear: {start: ..., end: ..., target"),
    ("{ value: 0.25 }", "{ valu: 0.25 }", 14, "constant.valu", "did you mean value?"),
    ("{ value: 0.25 }", "{ value: 1.1 }", 14, "constant.value", "between 0 and 1, not 1.1"),
    ("{ value: 0.25 }", "{ value: half }", 14, "constant.value", "wants a number, not the text 'half'"),
    ("{ value: 0.25 }", "{}", 14, "constant.value", "is missing"),
    ("{ value: 0.25 }", "0", 14, "constant.value", "is missing"),
    ("{ value: 0.25 }", "0.25", 14, "constant", "wants constant: {value: ...}, not 0.25"),
    ("clock: 0", "clock: {a: 1}", 15, "clock.a", "it has no options"),
    ("clock: 0", "clock: 1", 15, "clock", "wants 0, not 1"),
    ("clock: 0", "loss_divergence: {target: 1}", 15, "loss_divergence.target", "possible: target_divergence_loss"),
    ("clock: 0", "linear: {start: 0, end: 1, target: 0}", 15, "linear.target", "at least 1"),
    ("clock: 0", "loss_divergence: {target_divergence_loss: 0}", 15, "loss_divergence.target_divergence_loss", "more"),
    ("- clock: 0", "- timeout_ms: 3", 15, "timeout_ms", "given twice (first on line 9)"),
    ("- clock: 0", "- clock: 0\n  clock: 0", 16, "[6].clock", "given twice (first on line 15)"),
    ("- clock: 0", "- clock", 15, "[6]", "wants a key with a value, not the text 'clock'"),
    ("name: c,", "name: c, name: d,", 6, "[0].nodes[2].name", "given twice"),
    ("- {name: c, host: node7, port: 4001}", "- node7:4001", 6, "nodes[2]", "wants a node, as {name: w1}"),
    ("{ value: 0.25 }", "{ value: 0.25", 15, None, "not valid YAML: a comma or a closing bracket is missing"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), MISTAKES)
def test_mistakes(tmp_path: Path, old: str, new: str, line: int, key: str | None, words: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, FILE.replace(old, new, 1))
    error = caught.value
    assert (error.exit_code, error.file, error.line, error.key) == (2, str(tmp_path / "d.yaml"), line, key)
    assert words in str(error)
    assert "\n" not in str(error)


def test_all_mistakes_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = FILE.replace("0.5", "7").replace("1500", "soon").replace("- loss: 0", "- los: 0")
    text = text[: text.index("- nodes")] + "- nodes: 3\n" + text[text.index("- fetch") :]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    first, *others = str(caught.value).split("\n")
    assert first == "4 mistakes"
    assert [line.split(": ")[1] for line in others] == ["nodes", "fetch_probability", "timeout_ms", "los"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty: a file of dpwa is a list of keys with values"),
        ("# nothing\n---\n", "is empty"),
        ("[]", "is empty"),
        ("clock", "has the text 'clock' alone"),
        ("interpolation: *x", "not valid YAML"),
        ("<<<nodes>>>: {", "not valid YAML"),
        (b"\xff\xfe\x00", "UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "not a text in UTF-8"),
    ],
)
def test_what_is_no_file_of_dpwa(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=r"d\.yaml") as caught:
        read(tmp_path, content)
    assert words in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "dpwa.yaml").touch()
    with pytest.raises(ConfigError, match=r"dpwaa\.yaml: there is no such file; did you mean .*dpwa\.yaml\?"):
        read_dpwa(str(tmp_path / "dpwaa.yaml"))
    with pytest.raises(ConfigError, match="is a folder"):
        read_dpwa(str(tmp_path))
