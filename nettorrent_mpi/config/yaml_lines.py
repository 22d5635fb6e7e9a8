"""Reads YAML and remembers the line of each value, or the text of the `--set` that it comes from.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/, section 10.3), which has fewer surprises than
the 1.1 rules of PyYAML: `1e-3` is a number, `no` and `on` are texts, `010` is not octal, `2024-01-01` is not a date.
Nothing is ever constructed but None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import math
import re
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
    """A Document holds plain data, and the place of every value by its path."""

    value: Any
    places: dict[Path, Source] = field(default_factory=dict)

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


def read(text: str, file: str) -> Document:
    """Read the one document in `text`. Raises ConfigError with `file` and the line for what is not plain YAML."""
    document = Document(None, {(): Source(file, None)})
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            document.value = _Builder(file, document.places).build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "unreadable"
        raise ConfigError(f"not valid YAML: {problem}", file=file, line=mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"not valid YAML: the character U+{error.character:04X} is not allowed", file=file, line=line
        ) from None
    except RecursionError:
        raise ConfigError("nested too deeply", file=file) from None
    return document


class _Builder:
    """Turns the nodes of one document into plain data and notes their lines."""

    def __init__(self, file: str, places: dict[Path, Source]):
        self.file, self.places = file, places
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
        if isinstance(node, yaml.SequenceNode):
            self.only(node, "seq", path)
            built: Any = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            self.only(node, "map", path)
            built = self.mapping(node, path)
        self.above.remove(id(node))
        return built

    def mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise self.error(f"a key must be a name, not {shown}", key_node, path)
            key = key_node.value
            if key in built:
                first = self.places[(*path, key)].line
                raise self.error(f"given twice (first on line {first})", key_node, (*path, key))
            # the line of a key, not of its value: that is where a person looks for it
            self.places[(*path, key)] = Source(self.file, key_node.start_mark.line + 1)
            built[key] = self.build(value_node, (*path, key))
        return built

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text = node.value
        if kind == "str":
            return text
        readers: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
            "null": (_NULL, lambda _: None),
            "bool": (_BOOL, lambda t: t.lower() == "true"),
            "int": (_INT, _whole),
            "float": (_FLOAT, lambda t: float(t.replace("_", ""))),
        }
        if kind not in readers:
            raise self.error(f"the tag {node.tag} has no meaning here", node, path)
        pattern, reader = readers[kind]
        value = reader(text) if pattern.match(text) else math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"not a number that can be used: {text!r}", node, path)
        return value

    def only(self, node: yaml.Node, kind: str, path: Path) -> None:
        if node.tag != _TAG + kind:
            raise self.error(f"the tag {node.tag} has no meaning here", node, path)

    def error(self, message: str, node: yaml.Node, path: Path) -> ConfigError:
        return ConfigError(message, file=self.file, key=dotted(path) or None, line=node.start_mark.line + 1)


def _whole(text: str) -> int | float:
    digits = text.replace("_", "")
    return int(digits) if len(digits) < 400 else math.inf  # longer ones Python itself refuses to read or print


def write(data: Any) -> str:
    """Write `data` as YAML that `read` returns unchanged: keys in their order, short lists and mappings on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
