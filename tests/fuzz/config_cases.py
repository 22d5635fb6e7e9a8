"""Configurations: sound ones whose lines, words and structure are changed, and texts that are made to be too much."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.mutations import mutated, mutations

ROOT = Path(__file__).resolve().parents[2]
_WORDS = [
    "1" + "0" * 25, "9" * 399, "9" * 5000, "-1", "0", "1e308", "1e-320", ".inf", ".nan", "true", "~", "''", "[]", "{}",
    "2147483647", "2147483648", "9223372036854775807", "1_000", "0x10", "0o7", "1:30", "2026-01-01", "!!binary aGVs",
    "!!python/object/apply:os.system [touch ran]", "!!python/name:os.system", "!!set {a, b}", "!!timestamp 2026-01-01",
    "!!omap [a: 1]", "!<tag:yaml.org,2002:str> 5", "! 5", "*a", "&a 5", "<<: *a", "{<<: [*a, *b]}", "|", ">",
    "? x", "- x", "\u202e5", "\x1b[2J", "\x00", "\ufeff", "\u2028", "\x85", "\ud7ff", "a" * 10_000, "flatten", "linear",
    "digits", "synthetic", "gossip", "[1, 2, 3]", "{a: 1}", "%YAML 1.1", "---", "...", "@x", "`x", "$HOME", "~root/x",
    "/dev/zero", "../../etc/passwd", "{linear: {units: 1000000000}}", "{linear: 2000000000}",
    "{residual: {layers: [relu]}}",
]  # fmt: skip
_LAYERS = ["relu", "flatten", "linear: 7", "dropout: 0.5", "batch_norm", "layer_norm", "max_pool2d: 1", "conv2d: 3"]

_NODES = "[{name: a, host: localhost, port: 4001}, {name: b, host: localhost, port: 4002}]"
_METHODS = [
    "constant: {value: 0.25}", "clock: 0", "loss: 0", "linear: {start: 0.6, end: 0.1, target: 300}",
    "loss_divergence: {target_divergence_loss: 0.4}",
]  # fmt: skip
_LINES = [f"nodes: {_NODES}", "fetch_probability: 0.5", "timeout_ms: 1500", "divergence_threshold: 0.3", *_METHODS]
DPWA = [
    "".join(f"{dash}{line}\n" for line in (*_LINES, f"interpolation: {method.partition(':')[0]}"))
    for dash in ("- ", "")
    for method in _METHODS
]


def _laughs(depth: int, width: int) -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def _merges(depth: int, width: int) -> str:
    lines = ["a0: &a0 {k: 1, l: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}], m{i}: 1}}" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def _many(count: int, layer: str) -> str:
    layers = "".join(f"  - {layer}\n" for _ in range(count))
    return f"data: {{name: digits}}\nmodel:\n layers:\n  - flatten\n{layers}  - linear: 10\ntrain: {{steps: 2}}\n"


def _nested(depth: int) -> str:
    return (
        "data: {name: digits}\nmodel: {layers: [flatten, "
        + "{residual: {layers: [" * depth
        + "{linear: 64}"
        + "]}}" * depth
        + ", {linear: 10}]}\ntrain: {steps: 2}\n"
    )


def too_much(random: Random) -> str:
    """Make a text that is short and asks for much: depth, repetition, aliases of aliases."""
    kind = random.choice(["deep", "deep", "laughs", "merges", "layers", "residual", "keys", "lines", "comment"])
    number = random.choice([2, 10, 50, 200, 1000, 5000, 30_000])
    if kind == "deep":
        opening = random.choice(["[", "{a: ", "- ", "? ", "!x [", "&a [", "'", '"', "[[],", "a:\n "])
        return random.choice(["data: ", ""]) + opening * number
    if kind in ("laughs", "merges"):
        made = _laughs if kind == "laughs" else _merges
        return made(min(number, 50), random.choice([2, 9, 50])) + random.choice(["", _many(1, "relu")])
    if kind == "layers":
        return _many(min(number, 5000), random.choice(_LAYERS))
    if kind == "residual":
        return _nested(min(number, 1000))
    if kind == "keys":
        return "".join(f"{random.choice(['k', 'seed', 'é'])}{i}: {i}\n" for i in range(min(number, 5000)))
    return ("#" if kind == "comment" else "\n") * number + _many(1, "relu")


def edited(random: Random, seeds: list[str]) -> str:
    """Make a sound text in which lines and words were changed."""
    lines = random.choice(seeds).split("\n")
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, max(len(lines) - 1, 0))
        line = lines[at] if lines else ""
        word = random.choice(_WORDS)
        key, colon, value = line.partition(":")
        kind = random.choice(["value", "value", "value", "key", "drop", "double", "move", "indent", "word", "anchor"])
        if kind == "value":
            lines[at : at + 1] = [f"{key}{colon or ':'} {word}"]
        elif kind == "key":
            lines[at : at + 1] = [line[: len(line) - len(line.lstrip())] + word + ":" + value]
        elif kind == "drop":
            del lines[at : at + 1]
        elif kind == "double":
            lines[at:at] = [line] * random.choice([1, 2, 100])
        elif kind == "move":
            other = random.choice(seeds).split("\n")
            first = random.randint(0, len(other) - 1)
            lines[at:at] = other[first : first + random.randint(1, 8)]
        elif kind == "indent":
            lines[at : at + 1] = [random.choice([" ", "\t", "    ", "- ", "? ", "\xa0"]) + line]
        elif kind == "word":
            place = random.randint(0, len(line))
            lines[at : at + 1] = [line[:place] + word + line[place:]]
        else:
            lines[at : at + 1] = [f"{key}{colon or ':'} &a {value}"]
            lines.append(f"{random.choice(['train', 'seed', 'layout', 'x'])}: *a")
    return "\n".join(lines)


def seeds() -> list[str]:
    """Return the project's own configurations."""
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]


def configurations(random: Random, sound: list[str]) -> bytes:
    """Make the bytes of a configuration."""
    kind = random.randint(0, 9)
    if kind == 0:
        return too_much(random).encode("utf-8", "surrogatepass")
    if kind <= 2:
        others = [text.encode() for text in sound]
        return mutated(random.choice(others), mutations(random), others)
    text = edited(random, sound)
    return text.encode(random.choice(["utf-8"] * 20 + ["utf-16", "utf-8-sig", "cp1252"]), "replace")
