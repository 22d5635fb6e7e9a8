"""nettorrent_mpi trains neural networks over MPI with one swarm of ranks per layer.

    import nettorrent_mpi as nt

The names in `__all__` load when they are first used (PEP 562): importing the package loads neither NumPy nor MPI, so
that `nt.prepare()` can set their environment first.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nettorrent_mpi.api import Trainer
    from nettorrent_mpi.data.dataset import DataOptions, register_dataset
    from nettorrent_mpi.data.from_arrays import from_arrays
    from nettorrent_mpi.data.rows import Dataset
    from nettorrent_mpi.engine.evaluation import Evaluation
    from nettorrent_mpi.engine.record import Record
    from nettorrent_mpi.engine.trained_network import TrainedNetwork, load
    from nettorrent_mpi.env import prepare
    from nettorrent_mpi.nn.layer import Context, Features, Layer, Parameter
    from nettorrent_mpi.nn.layers.registry import Site, register_layer
    from nettorrent_mpi.nn.model import Network
    from nettorrent_mpi.plan.errors import (
        ConfigError,
        DataError,
        LayoutError,
        NetTorrentError,
        NetTorrentWarning,
        NonFiniteError,
        OutputError,
        ShapeError,
        UserError,
    )
    from nettorrent_mpi.plan.exchange_specs import Allreduce, Async, Elite, Gossip, Gpipe, Nothing, OneFOneB
    from nettorrent_mpi.plan.specs import (
        Adagrad,
        Adam,
        AdamW,
        AvgPool2d,
        BatchNorm,
        BinaryCrossEntropy,
        Constant,
        Conv2d,
        Cosine,
        CrossEntropy,
        Dropout,
        Exponential,
        Flatten,
        Gelu,
        GlobalAvgPool2d,
        LayerNorm,
        LayerSpec,
        LeakyRelu,
        Linear,
        MaxPool2d,
        MeanSquaredError,
        Relu,
        Residual,
        Rmsprop,
        Sgd,
        Sigmoid,
        Step,
        Tanh,
    )
    from nettorrent_mpi.planning import PlannedRun, load_config, plan

_WHERE = {
    "api": "Trainer",
    "planning": "PlannedRun load_config",
    "env": "prepare",
    "engine.record": "Record",
    "engine.evaluation": "Evaluation",
    "engine.trained_network": "TrainedNetwork load",
    "nn.model": "Network",
    "nn.layer": "Context Features Layer Parameter",
    "nn.layers.registry": "Site register_layer",
    "data.rows": "Dataset",
    "data.from_arrays": "from_arrays",
    "data.dataset": "DataOptions register_dataset",
    # layers; losses; optimizers; learning-rate schedules
    "plan.specs": "AvgPool2d BatchNorm Conv2d Dropout Flatten Gelu GlobalAvgPool2d LayerNorm LayerSpec LeakyRelu "
    "Linear MaxPool2d Relu Residual Sigmoid Tanh BinaryCrossEntropy CrossEntropy MeanSquaredError "
    "Adagrad Adam AdamW Rmsprop Sgd Constant Cosine Exponential Step",
    # pipelines; how replicas agree
    "plan.exchange_specs": "Async Gpipe OneFOneB ZeroBubble Allreduce Elite Gossip Nothing",
    "plan.errors": "ConfigError DataError LayoutError NetTorrentError NetTorrentWarning NonFiniteError OutputError "
    "ShapeError UserError",
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted([*_MODULES, "plan"])  # noqa: PLE0605


class _Plan(ModuleType):
    """The subpackage plan/, callable as the function planning.plan: both are `nettorrent_mpi.plan`."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return import_module(f"{__name__}.planning").plan(*args, **settings)


import_module(f"{__name__}.plan").__class__ = _Plan


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
