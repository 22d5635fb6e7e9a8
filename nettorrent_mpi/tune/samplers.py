"""Samplers choose the point of a trial by its number: all points of a grid, points drawn at random, or those that
Optuna's TPE expects most.

Grid and random depend on the number and the seed alone, so a study tries the same points on any number of groups. TPE
depends on the trials that have ended before, too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nettorrent_mpi.config.search_file import Search
from nettorrent_mpi.config.search_space import Label
from nettorrent_mpi.plan.seeds import key
from nettorrent_mpi.tune import parzen
from nettorrent_mpi.tune.trials import Trial


def point(search: Search, number: int, told: Sequence[Trial]) -> dict[str, Label]:
    """Return the point of a trial; `told` are the others so far."""
    sections = search.sections
    if sections.sampler == "grid":
        return search.grid_point(number)
    if sections.sampler == "random":
        chances = {name: random.Random(key(sections.seed, "search", number, name)) for name in search.parameters}
        return {name: parameter.draw(chances[name]) for name, parameter in search.parameters.items()}
    return parzen.next_point(search.parameters, key(sections.seed, "search", number) % 2**32, told)


def check(search: Search) -> None:
    """Raise a ConfigError where the sampler needs a package that is not there."""
    if search.sections.sampler == "tpe":
        parzen.check()
