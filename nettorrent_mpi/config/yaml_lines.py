"""Reads YAML and remembers the line of each value, or the text of the `--set` that it comes from.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/, section 10.3), which has fewer surprises than
the 1.1 rules of PyYAML: `1e-3` is a number, `no` and `on` are texts, `010` is not octal, `2024-01-01` is not a date.
Nothing is ever constructed but None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from nettorrent_mpi.plan.errors import ConfigError

Path = tuple[str | int, ...]

MOST_NODES = 100_000  # of one document: aliases of aliases can blow a few lines up to gigabytes

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_SCALARS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT),
)  # fmt: skip
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Resolves scalars by our own rules alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or our own rules would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_RULES = [(_TAG + name, pattern) for name, pattern in _SCALARS]
_Loader.yaml_implicit_resolvers = {None: _RULES}
_Dumper.yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RULES}


class Source(NamedTuple):
    """A Source says where a value was written: a file and its line, or the text of a `--set`."""

    file: str | None
    line: int | None = None


@dataclass
class Document:
    """A Document holds plain data, the place of every value by its path, and what is `wrong` about keys, which were
    left out, and about values, which are None instead (at the paths `unread`)."""

    value: Any
    places: dict[Path, Source] = field(default_factory=dict)
    wrong: list[ConfigError] = field(default_factory=list)
    unread: set[Path] = field(default_factory=set)

    def place(self, path: Path) -> Source:
        """Return the place of the value at `path`, or of the nearest value around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Source(None)

    def error(self, message: str, path: Path = ()) -> ConfigError:
        place = self.place(path)
        return ConfigError(message, file=place.file, key=dotted(path) or None, line=place.line)

    def record(self, path: Path, place: Source) -> None:
        """Record that everything at and below `path` was written at `place`."""
        self.places = {p: q for p, q in self.places.items() if p[: len(path)] != path}
        self.places[path] = place


def dotted(path: Path) -> str:
    """Write ("model", "layers", 3, "conv2d") as `model.layers[3].conv2d`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def path_of(key: str) -> Path:
    """Read what `dotted` wrote; a position may also stand between dots: `model.layers.3.conv2d`."""
    return tuple(int(part) if part.isdecimal() else part for part in re.sub(r"\[(\d+)\]", r".\1", key).split("."))


def read(text: str, file: str) -> Document:
    """Read the one document in `text`. Raises ConfigError with `file` and the line for what is not YAML."""
    document = Document(None, {(): Source(file, None)})
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            document.value = _Builder(file, document).build(root, ())
    except yaml.MarkedYAMLError as error:
        problem, line = _in_words(error, text)
        raise ConfigError(f"not valid YAML: {problem}", file=file, line=line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"not valid YAML: the character U+{error.character:04X} is not allowed", file=file, line=line
        ) from None
    except RecursionError:
        raise ConfigError("nested too deeply", file=file) from None
    return document


def _in_words(error: yaml.MarkedYAMLError, text: str) -> tuple[str, int | None]:
    """Say what is wrong about a text that is no YAML, as its writer sees it, and in which line."""
    mark, began = error.problem_mark or error.context_mark, error.context_mark
    problem = error.problem or error.context or "unreadable"
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", text)  # as YAML counts them

    if mark is None:
        return problem, None
    here, line = lines[mark.line] if mark.line < len(lines) else "", mark.line
    indentation = "the indentation does not fit the lines above: what belongs together begins in the same column"
    if "'\\t'" in problem:
        problem = "there is a tab: YAML wants spaces, for the indentation and after a colon"
    elif "cannot start any token" in problem:
        problem = f"a text that begins with {here[mark.column : mark.column + 1]} needs quotes"
    elif "mapping values are not allowed" in problem:
        twice = re.search(r":\s", here[: mark.column])
        problem = "a text with a colon and a space in it needs quotes" if twice else indentation
        above = _colon(lines[line - 1]) if line else None
        if above and not twice:
            problem, line = above, line - 1
    elif "expected <block end>" in problem:
        problem = indentation
    elif "could not find expected ':'" in problem and began is not None:
        line = began.line
        problem = _colon(lines[line]) or "a key has no colon and space after it"
    elif "sequence entries are not allowed" in problem:
        problem = "a - begins an entry of a list, on a line of its own; as a text it needs quotes"
    elif "another document" in problem:
        problem = "a second document begins here (---), and a configuration is one"
    elif "while scanning a quoted" in (error.context or "") and "end of stream" in problem and began is not None:
        line, problem = began.line, "a quote is not closed"
    elif "expected ',' or" in problem:
        problem = "a comma or a closing bracket is missing"
    return problem, line + 1


def _colon(line: str) -> str | None:
    """Say what is wrong about the colon after the key of a line; None if nothing is."""
    if "\uff1a" in line:
        return "this colon is a full-width one: write an ordinary one, and a space after it"
    glued = re.match(r"[\s-]*([\w.]+:)[^\s:]", line)
    return f"a space is missing after {glued[1]}" if glued else None


class _Builder:
    """Turns the nodes of one document into plain data and notes their lines."""

    def __init__(self, file: str, document: Document):
        self.file, self.document, self.places = file, document, document.places
        self.above: set[int] = set()  # nodes that are being built: an alias to one of them never ends
        self.count = 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.places.setdefault(path, Source(self.file, node.start_mark.line + 1))
        if path == ():
            self.places[path] = Source(self.file, node.start_mark.line + 1)
        self.count += 1
        if self.count > MOST_NODES:
            raise self.error(f"more than {MOST_NODES} values", node, path)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.above:
            raise self.error("an alias that contains itself", node, path)
        self.above.add(id(node))
        sequence = isinstance(node, yaml.SequenceNode)
        built: Any = None
        if node.tag != _TAG + ("seq" if sequence else "map"):
            self.unread(f"the tag {node.tag} has no meaning here", node, path)
        elif sequence:
            built = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            built = self.mapping(node, path)
        self.above.remove(id(node))
        return built

    def mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key_node.value or "nothing" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.document.wrong.append(self.error(f"a key must be a name, not {shown}", key_node, (*path, shown)))
                continue
            key = key_node.value
            hidden = next((c for c in key if c != " " and unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cf")), None)
            if hidden is not None:
                name = f"U+{ord(hidden):04X} ({unicodedata.name(hidden).lower()})"
                text = f"the character {name} is in this key or before it: " + (
                    "remove it" if unicodedata.category(hidden) == "Cf" else "type a space"
                )
                self.document.wrong.append(self.error(text, key_node, (*path, key.strip())))
                continue
            if key in built:
                first = self.places[(*path, key)].line
                self.document.wrong.append(self.error(f"given twice (first on line {first})", key_node, (*path, key)))
                continue
            # the line of a key, not of its value: that is where a person looks for it
            self.places[(*path, key)] = Source(self.file, key_node.start_mark.line + 1)
            built[key] = self.build(value_node, (*path, key))
        return built

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text = node.value
        if kind == "str":
            if node.style is None and text[:1] in tuple("\u201c\u201d\u2018\u2019\u201e"):
                self.unread(f"{text[:1]} is a typographic quote: type \" or '", node, path)
            return text
        readers: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
            "null": (_NULL, lambda _: None),
            "bool": (_BOOL, lambda t: t.lower() == "true"),
            "int": (_INT, _whole),
            "float": (_FLOAT, lambda t: float(t.replace("_", ""))),
        }
        if kind not in readers:
            return self.unread(f"the tag {node.tag} has no meaning here", node, path)
        pattern, reader = readers[kind]
        value = reader(text) if pattern.match(text) else math.nan
        if isinstance(value, float) and not math.isfinite(value):
            return self.unread(f"not a number that can be used: {text[:60]!r}", node, path)
        return value

    def unread(self, message: str, node: yaml.Node, path: Path) -> None:
        """Note that a value cannot be read: it is None instead."""
        self.document.wrong.append(self.error(message, node, path))
        self.document.unread.add(path)

    def error(self, message: str, node: yaml.Node, path: Path) -> ConfigError:
        return ConfigError(message, file=self.file, key=dotted(path) or None, line=node.start_mark.line + 1)


def _whole(text: str) -> int | float:
    digits = text.replace("_", "")
    return int(digits) if len(digits) < 400 else math.inf  # longer ones Python itself refuses to read or print


def write(data: Any) -> str:
    """Write `data` as YAML that `read` returns unchanged: keys in their order, short lists and mappings on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
