"""Makes the pages of the reference from the code, whenever mkdocs builds the documentation."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import nettorrent_mpi as nt
from nettorrent_mpi.cli.arguments import make_parser
from nettorrent_mpi.config import sections
from nettorrent_mpi.config.described import descriptions, summary
from nettorrent_mpi.config.schema import schema
from nettorrent_mpi.plan import exchange_specs, specs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import pictures  # noqa: E402

Schema = Mapping[str, Any]
SECTIONS = {
    "data": sections.Data,
    "model": sections.Model,
    "train": sections.Train,
    "train.stop_at": sections.StopAt,
    "checkpoint": sections.Checkpoint,
    "layout": sections.Layout,
    "layout.swarms": sections.Swarm,
    "watchdog": sections.WatchdogTimes,
}
KINDS: dict[str, tuple[str, Mapping[str, type[Any]]]] = {
    "Layers": ("An element of `model.layers`.", specs.LAYERS),
    "Losses": ("`model.loss`.", specs.LOSSES),
    "Optimizers": ("`train.optimizer`. Formulas and defaults are PyTorch's.", specs.OPTIMIZERS),
    "Learning-rate schedules": ("`train.schedule`.", specs.SCHEDULES),
    "Pipelines": ("`pipeline`.", exchange_specs.PIPELINES),
    "Exchanges": ("`exchange`.", exchange_specs.EXCHANGES),
    "Weights of merged messages": ("`exchange.gossip.mix`.", exchange_specs.MIXES),
    "Compression of messages": ("`exchange.gossip.compress`.", exchange_specs.COMPRESSIONS),
    "Copies for when ranks are lost": ("`redundancy`.", exchange_specs.REDUNDANCIES),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages: dict[str, Callable[[], Iterable[str]]] = {
        "reference/configuration.md": configuration,
        "reference/commands.md": commands,
        "reference/python.md": python,
        "changes.md": lambda: [(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")],
    }
    for path, make in pages.items():
        files.append(File.generated(config, path, content="\n".join(make())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Draw the pictures that a page asks for."""

    def drawn(found: re.Match[str]) -> str:
        name, *words = found[1].split()
        return str(getattr(pictures, name)(*words))

    return re.sub(r"<!-- picture: ([\w ]+) -->", drawn, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Let the search work without a network: the theme's own way loads a script from elsewhere."""
    own = (ROOT / "docs" / "offline_search.js").read_text(encoding="utf-8")
    return re.sub(
        r'<script src="https://unpkg\.com/iframe-worker/shim"></script>', lambda _: f"<script>{own}</script>", output
    )


# -- the configuration -------------------------------------------------------------------------------------------------


def configuration() -> Iterator[str]:
    """Write the page of all options."""
    whole = schema()
    yield "# Configuration"
    yield ""
    yield (
        "A configuration is a YAML file. Here is every key, with its type, its default and its meaning; `nettorrent "
        "schema` prints the same for editors. A component is written as its name (`relu`), or as its name with options "
        "(`{dropout: {rate: 0.25}}`), the first of which may stand without its own name (`{dropout: 0.25}`)."
    )
    yield ""
    yield "## Top level"
    yield ""
    yield from table(sections.Config, whole["properties"])
    for path, kind in SECTIONS.items():
        yield f"## `{path}`"
        yield ""
        yield from table(kind, properties(whole, path))
    for title, (text, kinds) in KINDS.items():
        yield f"## {title}"
        yield ""
        yield text
        yield ""
        for name, spec in kinds.items():
            yield f"### `{name}` {{: #{title.split()[0].lower()}-{name} }}"
            yield ""
            yield escaped(summary(spec))
            yield ""
            yield from table(spec, options(whole, spec))
    yield "### `consensus`"
    yield ""
    yield escaped(summary(exchange_specs.Consensus))
    yield ""
    gossip = options(whole, exchange_specs.Gossip)["consensus"]["anyOf"]
    yield from table(exchange_specs.Consensus, next(e["properties"] for e in gossip if "properties" in e))


def properties(whole: Schema, path: str) -> Schema:
    """Return the schemas of a section's options."""
    found: Any = whole
    for key in path.split("."):
        found = found["properties"][key]
        choices = found.get("anyOf", [found])
        found = next((each for each in choices if each.get("type") in ("object", "array")), found)
        found = found.get("items", found)
    result: Schema = found["properties"]
    return result


def options(whole: Schema, spec: type[Any]) -> Schema:
    """Return the schemas of a spec's options."""
    written = whole["definitions"][spec.__name__]["anyOf"] if "anyOf" in whole["definitions"][spec.__name__] else [
        whole["definitions"][spec.__name__]
    ]  # fmt: skip
    named = next(each for each in written if "properties" in each)["properties"][spec.kind]
    found: Schema = next(each for each in named.get("anyOf", [named]) if "properties" in each)["properties"]
    return found


def table(kind: type[Any], found: Schema) -> Iterator[str]:
    """Write the options of a class as a table."""
    if not found:
        yield "It has no options."
        yield ""
        return
    texts = descriptions(kind)
    yield "| option | values | default | meaning |"
    yield "|---|---|---|---|"
    for field in fields(kind):
        values = " or ".join(dict.fromkeys(values_of(found[field.name])))
        yield f"| `{field.name}` | {values} | {default(field)} | {escaped(texts.get(field.name, ''))} |"
    yield ""


def values_of(found: Schema) -> Iterator[str]:
    """Yield in words what a value may be."""
    if "allOf" in found:
        yield from values_of(found["allOf"][0])
    elif "anyOf" in found:
        for each in found["anyOf"]:
            yield from values_of(each)
    elif "enum" in found:
        for each in found["enum"]:
            yield f"`{each}`"
    elif "const" in found:
        yield f"`{found['const']}`"
    elif "$ref" in found:
        name = found["$ref"].rpartition("/")[2]
        for title, (_, kinds) in KINDS.items():
            for word, spec in kinds.items():
                if spec.__name__ == name:
                    yield f"[`{word}`](configuration.md#{title.split()[0].lower()}-{word})"
    elif found.get("type") == "array":
        items = found["items"]
        inner = items[0] if isinstance(items, list) else items
        if inner.get("type") == "object":
            yield "a list of mappings"
        else:
            yield "a list of " + " or ".join(dict.fromkeys(values_of(inner)))
    else:
        words = {"null": "`null`", "object": "a mapping", "boolean": "`true` or `false`", "string": "a text"}
        words |= {"integer": "a whole number", "number": "a number"}
        limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        bounds = [
            f"{sign} {found[name]}" for name, sign in limits.items() if name in found and found[name] != specs.MOST
        ]
        yield words[found["type"]] + (f" ({', '.join(bounds)})" if bounds else "")


def default(field: Any) -> str:
    """Write the default of a dataclass's field."""
    value = field.default if field.default is not MISSING else MISSING
    if value is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return "required"
    if isinstance(value, specs.Spec):
        return f"`{value.kind}`"
    if is_dataclass(value):
        return "see below"
    words = {None: "`null`", True: "`true`", False: "`false`", (): "`[]`"}
    if value is None or value is True or value is False or value == ():
        return words[value]
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, with the words of YAML."""
    return re.sub(r"([*_|<>])", r"\\\1", re.sub(r"\bNone\b", "null", text))


# -- commands ----------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Write the page of all commands, from their parsers."""
    yield "# Commands"
    yield ""
    yield "`nettorrent COMMAND --help` shows the same. `nettorrent train` is also `python -m nettorrent_mpi.train`."
    yield ""
    yield from subcommands(make_parser(), "##")


def subcommands(parser: argparse.ArgumentParser, level: str) -> Iterator[str]:
    """Write the commands of a parser."""
    choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {each.dest: each.help for each in choices._choices_actions}
    for name, command in choices.choices.items():
        yield f"{level} `{command.prog}`"
        yield ""
        yield from paragraphs(command.description or f"{(helps.get(name) or '').capitalize()}.")
        if any(isinstance(a, argparse._SubParsersAction) for a in command._actions):
            yield from subcommands(command, level + "#")
            continue
        usage = " ".join(command.format_usage().split()).removeprefix("usage: ")
        yield f"    {usage}\n"
        yield "| argument | meaning |"
        yield "|---|---|"
        for action in command._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            called = ", ".join(f"`{each}`" for each in action.option_strings) or f"`{action.metavar or action.dest}`"
            value = f" `{action.metavar}`" if action.option_strings and action.metavar else ""
            if action.choices and action.option_strings:
                value = f" `{{{','.join(map(str, action.choices))}}}`"
            yield f"| {called}{value} | {escaped(' '.join((action.help or '').split()))} |"
        yield ""


def paragraphs(text: str) -> Iterator[str]:
    """Write the description of a command: indented lines are its examples."""
    for part in text.split("\n\n"):
        yield part if part.startswith(" ") else escaped(" ".join(part.split()))
        yield ""


# -- Python ------------------------------------------------------------------------------------------------------------

GROUPS = {
    "Training": "Trainer plan load_config PlannedRun Record Evaluation prepare",
    "Trained networks": "load TrainedNetwork",
    "Data": "from_arrays register_dataset DataOptions Dataset",
    "Layers of your own": "register_layer Layer LayerSpec Context Features Parameter Site Network",
    "Errors": "NetTorrentError UserError ConfigError DataError ShapeError LayoutError OutputError NonFiniteError "
    "NetTorrentWarning",
}


def python() -> Iterator[str]:
    """Write the page of the public names; mkdocstrings shows each with its signature and docstring."""
    yield "# Python"
    yield ""
    yield "`import nettorrent_mpi as nt` loads neither NumPy nor MPI: each name loads when it is first used."
    yield ""
    components = [name for name in nt.__all__ if is_component(getattr(nt, name))]
    grouped = " ".join(GROUPS.values()).split()
    if sorted([*grouped, *components]) != sorted(nt.__all__):
        raise PluginError(
            f"docs/hooks.py groups other names than nt.__all__: {set(nt.__all__) ^ {*grouped, *components}}"
        )
    for title, names in GROUPS.items():
        yield f"## {title}"
        yield ""
        for name in names.split():
            yield f"### `nt.{name}`"
            yield ""
            yield f"::: {place(getattr(nt, name), name)}"
            yield ""
    yield "## Components"
    yield ""
    yield "Layers, losses, optimizers, schedules, pipelines and exchanges take the options of the "
    yield "[configuration](configuration.md) as arguments:"
    yield ""
    for name in components:
        made = inspect.signature(getattr(nt, name))
        kept = [each.replace(annotation=each.empty) for each in made.parameters.values()]
        yield f"- `nt.{name}{made.replace(parameters=kept, return_annotation=made.empty)}`"
    yield ""
    yield "## PyTorch"
    yield ""
    yield "`import nettorrent_mpi.torch as nt` loads PyTorch; MPI starts at `parallelize`."
    yield ""
    for name in names_of_torch():
        yield f"### `nettorrent_mpi.torch.{name}`"
        yield ""
        yield f"::: nettorrent_mpi.torch.{name}"
        yield ""


def names_of_torch() -> list[str]:
    """Return the public names of nettorrent_mpi.torch, without PyTorch."""
    source = (ROOT / "nettorrent_mpi" / "torch" / "__init__.py").read_text(encoding="utf-8")
    found = next(
        n for n in ast.parse(source).body if isinstance(n, ast.Assign) and "__all__" in ast.unparse(n.targets[0])
    )
    names: list[str] = ast.literal_eval(found.value)
    return names


def is_component(value: Any) -> bool:
    """Whether a public name is the options of a component."""
    return isinstance(value, type) and issubclass(value, specs.Spec) and value is not specs.LayerSpec


def place(value: Any, name: str) -> str:
    """Return where a public name is defined."""
    if name == "plan":  # the package calls it: nt.plan is a module, too
        return "nettorrent_mpi.planning.plan"
    return f"{value.__module__}.{value.__name__}"
