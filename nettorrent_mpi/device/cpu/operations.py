"""All operations of the CPU on arrays of float32 and float64."""

from __future__ import annotations

from nettorrent_mpi.device.cpu.codecs import CodecOperations
from nettorrent_mpi.device.cpu.convolution import ConvolutionOperations
from nettorrent_mpi.device.cpu.criteria import CriterionOperations
from nettorrent_mpi.device.cpu.elementwise import ElementwiseOperations
from nettorrent_mpi.device.cpu.flat import FlatOperations
from nettorrent_mpi.device.cpu.masks import MaskOperations
from nettorrent_mpi.device.cpu.norms import NormOperations
from nettorrent_mpi.device.cpu.pools import PoolOperations
from nettorrent_mpi.device.cpu.products import ProductOperations
from nettorrent_mpi.device.cpu.updates import UpdateOperations


class CpuOperations(
    FlatOperations,
    CodecOperations,
    ProductOperations,
    ConvolutionOperations,
    ElementwiseOperations,
    MaskOperations,
    NormOperations,
    PoolOperations,
    CriterionOperations,
    UpdateOperations,
):
    """All operations (device.ops.Ops) of the CPU; each is in the module of its subject."""
