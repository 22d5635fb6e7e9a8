"""The process that shows what a command shows once: the launcher's first one, and rank 0 while ranks have met, which is
another process where the first ones are lost."""

from __future__ import annotations

import os
from collections.abc import Callable

# What launchers tell their processes' numbers by.
_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID", "SLURM_PROCID")
_rank: Callable[[], int] | None = None  # this process's present number among the ranks that have met


def is_first() -> bool:
    """Whether this process is the first one: it shows what is shown once, even if MPI cannot be used."""
    if _rank is not None:
        return _rank() == 0
    return launcher_rank() == 0


def launcher_rank() -> int:
    """Return this process's number among those that its launcher has started; 0 without one."""
    text = next((os.environ[name] for name in _VARIABLES if name in os.environ), "0")
    return int(text) if text.isdecimal() else 1


def numbered_by(rank: Callable[[], int] | None) -> None:
    """Let `rank` give this process's present number from now on; None: the launcher does."""
    global _rank  # noqa: PLW0603
    _rank = rank
