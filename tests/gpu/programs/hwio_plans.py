"""Builds cuDNN's plans of the benchmark's convolution with filters as HWIO, for every known GPU, without one."""

from __future__ import annotations

from benchmarks.gpu.convolutions import FAST, hwio_graph
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.cudnn import properties_of
from nettorrent_mpi.device.gpu.known import KNOWN

rows, image, count, kernel, stride, padding = FAST
geometry = Geometry.of(image, count, (kernel, kernel), (stride, stride), padding)
for gpu, facts in KNOWN.items():
    for name in ("float32", "tf32", "bfloat16"):
        print(gpu, name, hwio_graph(properties_of(facts), geometry, rows, name).get_workspace_size())
