"""The names of other packages that a module uses, read from its source: `cupy.cuda.Stream`, and of what a call of it
returns, `cupy.cuda.Stream().begin_capture`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

CALL = "()"


def names_of(source: str, packages: Iterable[str], given: Mapping[str, str] | None = None) -> set[str]:
    """Return all names that a source uses of these packages, imports included.

    It follows what is assigned: `cuda = cupy.cuda`, `self.stream = cupy.cuda.Stream()`. A function's variables are its
    own; an attribute has one meaning in a module: all that is assigned to it counts. `given` says what functions get or
    assign under a name: {"library": "cupy.cuda.nccl"}.
    """
    reader = _Reader(set(packages), given or {})
    tree = ast.parse(source)
    while True:  # until nothing new is known: a function may use what is assigned further down
        before = len(reader.found), reader.knowledge
        reader.visit(tree)
        if before == (len(reader.found), reader.knowledge):
            return reader.found


class _Reader(ast.NodeVisitor):
    def __init__(self, packages: set[str], given: Mapping[str, str]):
        self._packages, self._given = packages, given
        self._scopes: dict[ast.AST | None, dict[str, set[str]]] = {None: {}}  # what a function's variables may be
        self._inside: list[ast.AST | None] = [None]
        self.found: set[str] = set()

    @property
    def knowledge(self) -> int:
        return sum(len(meanings) for scope in self._scopes.values() for meanings in scope.values())

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in self._packages:
                name = alias.asname or alias.name.split(".")[0]
                self._know(name, {alias.name if alias.asname else name})
                self.found.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module is not None and node.level == 0 and node.module.split(".")[0] in self._packages:
            for alias in node.names:
                self._know(alias.asname or alias.name, {f"{node.module}.{alias.name}"})
                self.found.add(f"{node.module}.{alias.name}")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        arguments = node.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self._scopes.setdefault(node, {})
        self._inside.append(node)
        for name in names:
            if name is not None:
                self._know(name.arg, set())  # hides an outer one
        self.generic_visit(node)
        self._inside.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_FunctionDef(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)
        self.generic_visit(node)

    def visit_withitem(self, node: ast.withitem) -> None:
        if node.optional_vars is not None:
            self._bind(node.optional_vars, node.context_expr)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found |= self._meanings(node)
        self.generic_visit(node)

    def _know(self, name: str, meanings: set[str]) -> None:
        scope = None if name.startswith(".") else self._inside[-1]
        known = {self._given[name]} if name in self._given else set[str]()
        self._scopes[scope].setdefault(name, known).update(meanings)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)
        elif isinstance(target, ast.Name):
            self._know(target.id, self._meanings(value))
        elif isinstance(target, ast.Attribute):
            self._know(f".{target.attr}", self._meanings(value))

    def _meanings(self, node: ast.expr) -> set[str]:
        """Return what an expression may be."""
        if isinstance(node, ast.Name):
            return next((self._scopes[f][node.id] for f in self._inside[::-1] if node.id in self._scopes[f]), set())
        if isinstance(node, ast.Call):
            return {meaning + CALL for meaning in self._meanings(node.func)}
        if isinstance(node, ast.Attribute):
            own = {f"{meaning}.{node.attr}" for meaning in self._meanings(node.value)}
            return own or self._scopes[None].get(f".{node.attr}", set())
        return set()


def missing(name: str) -> str | None:
    """Return the first part of a name that does not exist, or None.

    Instances have what their class has, or lists in its documentation. What a function or an attribute of an instance
    is, and so what comes after it, is not known.
    """
    parts = name.replace(CALL, f".{CALL}").split(".")
    found: Any = importlib.import_module(parts[0])
    instance = False
    for i, part in enumerate(parts[1:], 1):
        here = ".".join(parts[: i + 1]).replace(f".{CALL}", CALL)
        if part == CALL:
            if instance or not isinstance(found, type):
                return None
            instance = True
        elif instance:
            described = f"~{found.__name__}.{part}" in (found.__doc__ or "")
            return None if hasattr(found, part) or described else here
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            try:
                found = importlib.import_module(here)
            except ImportError:
                return here
    return None
