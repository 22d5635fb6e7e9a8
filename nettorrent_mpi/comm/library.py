"""The MPI library. It loads when it is first used, so that a process that is alone needs none."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nettorrent_mpi.plan.errors import LaunchError

__all__ = ["MPI", "loaded"]


def loaded() -> bool:
    """Whether MPI has been loaded, by this package or by a script."""
    return "mpi4py.MPI" in sys.modules


def _load() -> Any:
    try:
        import_module("mpi4py").rc.thread_level = "multiple"
        return import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        told = str(error).splitlines()  # mpi4py names every file that it has tried
        reason = ": ".join(told) if len(told) < 3 else told[0]
        raise LaunchError(
            f"MPI cannot be loaded ({reason}): load your site's MPI module, or install one with pip install '.[mpi]'"
        ) from error


class _Library:
    """Stands for the module mpi4py.MPI and loads it when a name in it is first used."""

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(_load(), name)
        return value


if TYPE_CHECKING:
    from mpi4py import MPI
else:
    MPI = _Library()
