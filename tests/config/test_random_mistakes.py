"""Configurations with random mistakes, one or several at once: each is told with its file, line and key."""

from __future__ import annotations

import random
import re
import warnings
from pathlib import Path

import pytest

from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.planning import load_config, placed, plan

RANKS = 4
# Every line has one key; what may stand there is the second word.
LINES = [
    ("seed: 1", "count"),
    ("dtype: float32", "word"),
    ("data:", "mapping"),
    ("  name: digits", "word"),
    ("  validation: 0.1", "part"),
    ("  augment: [crop]", "words"),
    ("model:", "mapping"),
    ("  layers:", "list"),
    ("    - conv2d:", "layer"),
    ("        filters: 8", "size"),
    ("        kernel: 3", "pair"),
    ("        padding: same", "word"),
    ("        activation: relu", "word"),
    ("    - batch_norm:", "layer"),
    ("        momentum: 0.2", "part"),
    ("    - max_pool2d: 2", "pair"),
    ("    - flatten", "name"),
    ("    - dropout: 0.25", "part"),
    ("    - linear:", "layer"),
    ("        units: 10", "size"),
    ("        bias: true", "flag"),
    ("  loss: cross_entropy", "word"),
    ("train:", "mapping"),
    ("  epochs: 3", "size"),
    ("  batch_size: 32", "size"),
    ("  clip_norm: 1.5", "positive"),
    ("  report_every: 5", "size"),
    ("  optimizer:", "mapping"),
    ("    adam:", "spec"),
    ("      lr: 0.001", "positive"),
    ("      betas: [0.9, 0.99]", "betas"),
    ("      weight_decay: 0.1", "number"),
    ("  schedule:", "mapping"),
    ("    cosine:", "spec"),
    ("      final: 0.1", "part"),
    ("      warmup_steps: 10", "number"),
    ("  stop_at:", "mapping"),
    ("    accuracy: 0.9", "part"),
    ("layout:", "mapping"),
    ("  replicas: 2", "size"),
    ("pipeline: 1f1b", "word"),
    ("exchange:", "mapping"),
    ("  gossip:", "mapping"),
    ("    pairing: ring", "word"),
    ("    every: 2", "size"),
    ("    overlap: true", "flag"),
    ("    probability: 0.5", "part"),
    ("trace: false", "flag"),
    ("watchdog:", "mapping"),
    ("  report: 30", "size"),
    ("  end: 300", "size"),
    ("kernels: numpy", "word"),
    ("device: cpu", "word"),
]
NUMBERS = ["many", "''", "true", "[]", "{a: 1}", "'3'", "-3", "1,5", "0x1F", "3 rows", ".inf"]
WRONG = {
    "count": [*NUMBERS, "2.5", "1e3"],
    "size": [*NUMBERS, "2.5", "0", "1e3", "-1" + "0" * 30, "[3, 3]"],
    "pair": [*NUMBERS, "0", "[3]", "[3, 3, 3]", "[3, x]", "[0, 3]", "3x3", "1.5"],
    "part": [*NUMBERS, "1.5", "80", "50 %", "nan"],
    "positive": [*NUMBERS, "0", "0.0", "-1e-3"],
    "number": [*NUMBERS, "-0.5"],
    "betas": [*NUMBERS, "[0.9]", "[0.9, 1.5]", "[0.9, 0.99, 0.999]", "0.9", "[a, b]"],
    "flag": ["yes", "1", "'true'", "[]", "{}", "0.0", "on", "~", "tru"],
    "words": ["crop", "[corp]", "[crop, crop]", "7", "{crop: 1}", "[[crop]]", "[1]"],
    "word": ["zzz", "7", "[]", "true", "''", "1.5", "tpu", "softmax", "{zzz: 1}", "[{}]", "-"],
    "mapping": ["7", "[]", "zzz", "1.5", "true", "[1, 2]"],
    "spec": ["[]", "zzz", "-1", "true", "[1, 2]"],
    "list": ["7", "zzz", "{}", "{flatten: {}}", "true"],
    "layer": ["[]", "true", "{zzz: 1}", "{units: x, filters: x, momentum: x}"],
    "name": ["{}", "[]", "flaten", "softmax", "7", "{flatten: 3}", "{flatten: {size: 2}}", "Dense(10)", "LSTM"],
}
KERAS = ["learning_rate", "num_epochs", "gpu", "kernel_size", "metrics", "zzz", "shuffle", "step_size", "<<", "3.5"]
BITS = [
    "",
    "\t",
    "\n",
    "- ",
    ": ",
    "  ",
    "{",
    "]",
    "'",
    '"',
    "&a ",
    "*a",
    "!x ",
    "%",
    "#",
    "9" * 30,
    "\xa0",
    "|",
    "?",
    "x",
]
# Sizes that are right by themselves and do not go together with the network, the data or the ranks.
IMPOSSIBLE = [
    ("        kernel: 3", "kernel: [11, 3]", "        padding: same", "padding: valid"),
    ("    - max_pool2d: 2", "max_pool2d: 9"),
    ("    - max_pool2d: 2", "max_pool2d: 1" + "0" * 25),
    ("    - flatten", "relu"),
    ("        units: 10", "units: 9"),
    ("        units: 10", "units: 1" + "0" * 20),
    ("        filters: 8", "filters: 1" + "0" * 15),
    ("        filters: 8", "filters: 1" + "0" * 40),
    ("        kernel: 3", "kernel: 1" + "0" * 19),
    ("  batch_size: 32", "batch_size: 1"),
    ("  replicas: 2", "replicas: 3"),
    ("  replicas: 2", "replicas: 99"),
    ("  replicas: 2", "replicas: 1" + "0" * 30),
    ("  replicas: 2", "swarms: [{layers: 9}]"),
    ("  replicas: 2", "swarms: [{layers: 2, rows: 2, cols: 7}]"),
    ("  replicas: 2", "swarms: [{layers: 2, rows: 1" + "0" * 20 + "}]"),
    ("  validation: 0.1", "validation: 0.9999"),
    ("  loss: cross_entropy", "loss: {binary_cross_entropy: {}}", "        bias: true", "activation: sigmoid"),
    ("  name: digits", "name: synthetic\n  shape: [1" + "0" * 10 + "]"),
    ("  name: digits", "name: synthetic\n  shape: [1" + "0" * 6 + ", 1" + "0" * 6 + "]"),
    ("  name: digits", "name: hdf5\n  root: /none.h5"),
]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -")) if not line.lstrip().startswith("-") else line.index("-")


def inside(outer: int, inner: int) -> bool:
    """Whether line `inner` belongs to the value of line `outer`."""
    if inner <= outer:
        return False
    return all(indent(LINES[i][0]) > indent(LINES[outer][0]) for i in range(outer + 1, inner + 1))


def misspelt(word: str, dice: random.Random) -> str:
    at = dice.randrange(len(word) - 1)
    return dice.choice([
        word[:at] + word[at + 1] + word[at] + word[at + 2 :] if word[at] != word[at + 1] else word + "s",
        word[:at] + word[at] + word[at:],
        word[:at] + "q" + word[at + 1 :],
        word + "z",
        word.upper(),
    ])  # fmt: skip


def mistaken(number: int, dice: random.Random) -> str:
    """A line with a mistake in its key or value."""
    line, kind = LINES[number]
    head, name, value = re.match(r"( *(?:- )?)(\w+):? ?(.*)", line).groups()  # type: ignore[union-attr]
    how = dice.choice(["key", "value", "value", "foreign"])
    if how == "key" and kind != "name":
        return f"{head}{misspelt(name, dice)}: {value}".rstrip()
    if how == "foreign" and not head.endswith("- ") and kind not in ("mapping", "list", "spec"):
        return f"{head}{dice.choice(KERAS)}: {value or 3}"
    wrong = dice.choice(WRONG[kind])
    return f"{head}{wrong}" if kind == "name" else f"{head}{name}: {wrong}"


def with_mistakes(seed: int) -> tuple[str, list[int]]:
    """A configuration with mistakes, and their lines."""
    dice = random.Random(seed)
    chosen: list[int] = []
    for _ in range(dice.choice([1, 1, 2, 3, 5])):
        number = dice.randrange(len(LINES))
        if not any(inside(number, i) or inside(i, number) or i == number for i in chosen):
            chosen.append(number)
    lines: list[str | None] = [line for line, _ in LINES]
    for number in chosen:
        lines[number] = mistaken(number, dice)
        if lines[number] != LINES[number][0] and not lines[number].endswith(":"):  # type: ignore[union-attr]
            for i in range(len(lines)):
                if inside(number, i) and not re.search(r": *$", lines[number] or ""):
                    lines[i] = ""  # its value is on its own line now
    return "\n".join(line or "" for line in lines) + "\n", sorted(number + 1 for number in chosen)


def told(text: str, path: Path) -> UserError:
    """Return what reading and planning a configuration says of it."""
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = load_config(path)
            try:
                plan(config, ranks=RANKS)
            except UserError as error:
                return placed(error, path)
        except UserError as error:
            return error
    pytest.fail(f"nothing is said of\n{text}")


@pytest.mark.parametrize("block", range(5))
def test_every_mistake_is_told_with_key_and_line(block: int, tmp_path: Path) -> None:
    for seed in range(60 * block, 60 * block + 60):
        text, lines = with_mistakes(seed)
        error = told(text, tmp_path / "f.yaml")
        said = str(error)
        assert error.exit_code == 2
        told_at = {int(number) for number in re.findall(r"f\.yaml:(\d+): ", said)}
        if "not valid YAML" in said:  # only the first can be told
            assert told_at & set(lines), f"seed {seed}\n{said}\n{text}"
            continue
        assert told_at >= set(lines), f"seed {seed}\n{said}\n{text}"
        for _, words in re.findall(r"f\.yaml:(\d+): (.*)", said):
            assert re.match(r"[\w.<\[\]]+: \S", words), said


@pytest.mark.parametrize("number", range(len(IMPOSSIBLE)), ids=lambda n: IMPOSSIBLE[n][1][:40])
def test_sizes_that_do_not_go_together(number: int, tmp_path: Path) -> None:
    pairs = IMPOSSIBLE[number]
    text = "\n".join(line for line, _ in LINES) + "\n"
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old + "\n" in text
        text = text.replace(old + "\n", re.match(r" *(- )?", old)[0] + new + "\n")  # type: ignore[index]
    error = told(text, tmp_path / "f.yaml")
    assert error.exit_code == 2
    assert re.match(r".*/f\.yaml:\d+: [\w.\[\]]+: \S", str(error)), str(error)


def test_the_base_is_right(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("\n".join(line for line, _ in LINES))
    plan(load_config(tmp_path / "f.yaml"), ranks=RANKS)


def test_a_text_that_was_cut_or_mistyped_anywhere(tmp_path: Path) -> None:
    """Whatever a hand does to a text, it is still a configuration, or the error names the line."""
    path = tmp_path / "f.yaml"
    whole = "\n".join(line for line, _ in LINES) + "\n"
    for seed in range(100):
        dice = random.Random(seed)
        text = whole
        for _ in range(dice.choice([1, 2, 4])):
            at, length = dice.randrange(len(text)), dice.choice([0, 1, 1, 2, 30])
            text = text[:at] + dice.choice(BITS) + text[at + length :]
        path.write_text(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                plan(load_config(path), ranks=RANKS)
            except UserError as error:
                if not re.search(r"f\.yaml(:\d+)?: ", str(placed(error, path))):
                    pytest.fail(f"seed {seed}\n{error}\n{text}")
