"""The folders of the package are floors: a module imports lower floors, or modules that stand before it in its own."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nettorrent_mpi"
NAME = PACKAGE.name

# What each folder may import besides itself. The entry points (train, __main__) stand above all of them.
BELOW = {
    "plan": set[str](),
    "device": {"plan"},
    "nn": {"plan", "device"},
    "comm": {"plan", "device"},
    "data": {"plan", "device"},
    "config": {"plan"},
    "exchange": {"plan", "device", "comm"},
    "engine": {"plan", "device", "nn", "comm", "data", "config", "exchange"},
    "planning": {"plan", "device", "nn", "data", "config", "engine"},
    "api": {"plan", "device", "nn", "comm", "data", "config", "exchange", "engine", "planning"},
    "cli": {"plan", "device", "nn", "comm", "data", "config", "exchange", "engine", "planning", "api", "torch"},
    "torch": {"plan", "device", "nn", "comm", "data", "config", "exchange", "engine"},
    "speedup": {"plan", "device", "nn", "comm", "data", "config", "exchange", "engine", "cli", "torch"},
    "doctor": {"plan", "device", "comm", "data", "engine", "planning", "api", "cli", "speedup"},
    "tune": {"plan", "comm", "data", "config", "engine", "planning", "api", "cli", "speedup"},
}
# The command line knows every command, and a plan how it is shown; both load what stands above when it is asked for.
ASKED_FOR = {
    ("cli.commands", "speedup.command"),
    ("cli.commands", "doctor.doctor"),
    ("cli.commands", "tune.job"),
    ("planning", "cli.dry_run"),
}
# The order within a folder. Modules that are not listed only have to be free of cycles.
ORDER: dict[str, list[str]] = {
    "device": ["arrays", "random", "events", "geometry", "ops", "cpu", "gpu", "device"],
    "nn": ["layer", "initial", "rates", "optimizers", "losses", "fit", "layers", "model", "footprint"],
    "exchange": [
        "replicas",
        "base",
        "elite",
        "merging",
        "vector",
        "estimates",
        "mixer",
        "rounds",
        "calibration",
        "slow_momentum",
        "withheld",
        "gossip",
    ],
    "plan": [
        "errors",
        "seeds",
        "scores",
        "specs",
        "exchange_specs",
        "pairing",
        "mixing",
        "gossip_rules",
        "compression",
        "blocks",
        "moves",
        "topology",
        "layouts",
        "actions",
        "stream",
        "timeline",
        "list_search",
        "zero_bubble",
        "checker",
        "launches",
        "schedule",
        "performance",
        "sizes",
        "stage_cost",
        "cost",
        "search",
        "memory",
    ],
    "tune": ["trials", "parzen", "samplers", "study", "attempt", "pictures", "findings", "job"],
    "data": [
        "storage",
        "files",
        "augment",
        "sampler",
        "scaling",
        "rows",
        "from_arrays",
        "idx",
        "cifar",
        "synthetic",
        "hdf5_rows",
        "hdf5",
        "dataset",
    ],
}
# Packages that only these parts of the package import.
ONLY = {
    "mpi4py": ["comm"],
    "nccl": ["comm"],
    "cupy": ["device.gpu", "comm.nccl"],
    "cupyx": ["device.gpu"],
    "cudnn": ["device.gpu"],
    "nvmath": ["device.gpu"],
    "pydantic": ["config"],
    "yaml": ["config"],
    "rich": ["cli"],
    "numba": ["device.cpu.loop"],
    "torch": ["torch", "speedup.torch_training", "speedup.torch_peer", "speedup.torch_rows"],
    "onnx": ["engine.onnx_file"],
    "tensorboardX": ["cli.runs.event_files"],
    "matplotlib": ["speedup.plots", "tune.pictures"],
    "optuna": ["tune.parzen"],
}
# Packages that these parts do not import: layers, losses and optimizers are formulas over the device's operations.
NEVER = {"nn": ["numpy"]}
# Modules of the package that only these parts of it import: nobody above a device knows which library computes.
INSIDE = {"device.cpu": ["device.cpu", "device.device"], "device.gpu": ["device.gpu", "device.device"]}
STANDARD_LIBRARY_ONLY = ["", "env", "cores", "plan"]
TOP = {"", "env", "cores"}  # may be imported from everywhere
ENTRY_POINTS = {"train", "__main__", ""}  # the package itself names what is public, and loads it when it is used


def read() -> dict[str, ast.Module]:
    """Every module of the package: "plan.blocks" -> its syntax tree; "" is the package itself."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return modules


def imports_of(module: str, tree: ast.Module, modules: set[str]) -> tuple[set[str], set[str]]:
    """(modules of the package, other packages) that a module imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write the whole name instead of a relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inner if name.removeprefix(f"{NAME}.") in modules}
            names |= submodules or {node.module}
    own = {name for name in names if name.split(".")[0] == NAME}
    return {name.removeprefix(NAME).removeprefix(".") for name in own}, {name.split(".")[0] for name in names - own}


def inside(module: str, place: str) -> bool:
    return module == place or (place != "" and module.startswith(f"{place}."))


def violations(trees: dict[str, ast.Module]) -> list[str]:
    modules = set(trees)
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        own, others = imports_of(module, tree, modules)
        graph[module] = own - {module} if module else set()  # what the package names it loads when it is used
        folder = module.split(".")[0]
        for name in sorted(own):
            target = name.split(".")[0]
            for place, insiders in INSIDE.items():
                if inside(name, place) and not any(inside(module, insider) for insider in insiders):
                    found.append(f"{module} imports {name}, which only {insiders} may")
            if name in TOP or folder in ENTRY_POINTS or (module, name) in ASKED_FOR:
                continue
            if target == folder:
                found += out_of_order(folder, module, name)
            elif target not in BELOW.get(folder, set()):
                found.append(f"{module} imports {name}, which is not on a lower floor")
        for name in sorted(others):
            if any(inside(module, place) for place in STANDARD_LIBRARY_ONLY) and name not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}; it may use the standard library only")
            elif name in NEVER.get(folder, []):
                found.append(f"{module} imports {name}, which no module of {folder}/ may")
            if name in ONLY and not any(inside(module, place) for place in ONLY[name]):
                found.append(f"{module} imports {name}, which only {ONLY[name]} may")
        if folder != "cli" and folder not in ENTRY_POINTS:
            found += [f"{module} prints (line {line}); only cli/ does" for line in prints(tree)]
        if folder != "comm":
            found += [f"{module} calls {call} (line {line}), which only comm/ does" for call, line in makes(tree)]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"modules import each other in a ring: {' <- '.join(error.args[1])}")
    return found


def out_of_order(folder: str, module: str, name: str) -> list[str]:
    order = ORDER.get(folder, [])
    importing, imported = ((*part.split("."), "")[1] for part in (module, name))
    if importing in order and imported in order and order.index(imported) > order.index(importing):
        return [f"{module} imports {name}, which stands after it in its folder's order"]
    return []


# What makes something that has to be given back to MPI, and what gives it back. Constructors in comm/ do.
OF_MPI = {
    "Dup", "Clone", "Split", "Split_type", "Create_group", "Create_cart", "Create_graph", "Create_intercomm",
    "Allocate", "Allocate_shared", "Create_dynamic", "Send_init", "Ssend_init", "Recv_init", "Psend_init",
    "Precv_init", "Allreduce_init", "Bcast_init", "Barrier_init", "Free", "Disconnect",
}  # fmt: skip


def makes(tree: ast.Module) -> list[tuple[str, int]]:
    """(method, line) of every call that makes or frees a communicator, a window or a persistent request of MPI's."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [(call.func.attr, call.lineno) for call in calls if isinstance(call.func, ast.Attribute)]
    return [(name, line) for name, line in methods if name in OF_MPI]


def prints(tree: ast.Module) -> list[int]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_the_package_keeps_its_floors() -> None:
    trees = read()
    assert {"", "env", "plan.errors", "nn.layer"} <= set(trees)
    assert violations(trees) == []


def test_every_folder_has_its_floor() -> None:
    folders = {module.split(".")[0] for module in read()}
    assert folders - TOP - ENTRY_POINTS == set(BELOW)


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ({"plan.cost": "import numpy"}, "standard library only"),
        ({"env": "def f():\n    import numpy"}, "standard library only"),
        ({"nn.model": "from nettorrent_mpi.comm import world", "comm.world": ""}, "not on a lower floor"),
        ({"plan.cost": "from nettorrent_mpi import cli", "cli": ""}, "not on a lower floor"),
        ({"data.sampler": "from nettorrent_mpi.nn.layer import Context", "nn.layer": ""}, "not on a lower floor"),
        ({"plan.blocks": "import nettorrent_mpi.plan.cost", "plan.cost": ""}, "stands after it"),
        ({"engine.state": "from mpi4py import MPI"}, "only ['comm'] may"),
        ({"nn.losses": "import cupy as cp"}, "only ['device.gpu', 'comm.nccl'] may"),
        ({"nn.losses": "def f():\n    import numpy as np"}, "no module of nn/ may"),
        ({"device.cpu.norms": "from numba import njit"}, "only ['device.cpu.loop'] may"),
        ({"engine.state": "from nettorrent_mpi.device.cpu import blas", "device.cpu.blas": ""}, "'device.device'] may"),
        ({"device.arrays": "from nettorrent_mpi.device.geometry import x", "device.geometry": ""}, "stands after it"),
        ({"nn.losses": "import yaml"}, "only ['config'] may"),
        ({"comm.world": "print('x')"}, "only cli/ does"),
        ({"engine.engine": "def f(world):\n    return world.comm.Dup()"}, "calls Dup (line 2), which only comm/ does"),
        ({"exchange.gossip": "def f(group):\n    group.comm.Free()"}, "calls Free (line 2), which only comm/ does"),
        (
            {"cli.a": "from nettorrent_mpi.cli.b import x", "cli.b": "from nettorrent_mpi.cli import a"},
            "in a ring",
        ),
    ],
)
def test_violations_are_found(sources: dict[str, str], told: str) -> None:
    found = violations({name: ast.parse(source) for name, source in sources.items()})
    assert len(found) == 1
    assert told in found[0]


def test_what_is_allowed_is_not_told() -> None:
    sources = {
        "": "__version__ = '1'",
        "env": "import os",
        "plan.errors": "import math",
        "plan.cost": "from nettorrent_mpi.plan.errors import UserError",
        "device.gpu": "import cupy",
        "comm.world": "from mpi4py import MPI\nfrom nettorrent_mpi import __version__",
        "engine.wiring": "from nettorrent_mpi.comm import world\nfrom nettorrent_mpi.nn import backend",
        "cli.run": "import rich\nfrom nettorrent_mpi.engine.wiring import x\nprint(x)",
        "train": "from nettorrent_mpi import env\nfrom nettorrent_mpi.cli import run\nprint(run)",
    }
    assert violations({name: ast.parse(source) for name, source in sources.items()}) == []


def test_no_name_stands_twice() -> None:
    """Only the devices share names of modules: each has one for every subject of device.ops."""
    trees = read()
    for own in ("device.cpu.", "device.gpu."):
        some = [name for name in trees if not name.startswith(own)]
        modules = Counter(name.rsplit(".", 1)[-1] for name in some if not (PACKAGE / name.replace(".", "/")).is_dir())
        assert [name for name, count in modules.items() if count > 1] == []
    classes = Counter(node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
