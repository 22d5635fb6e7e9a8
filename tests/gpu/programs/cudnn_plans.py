"""Builds cuDNN's plans of every convolution of these configurations, for every known GPU and type, without one.
Prints a line for each: configuration, GPU, type, convolutions, and the most bytes that one works in."""

from __future__ import annotations

import sys

from nettorrent_mpi.device.gpu.cudnn import plan_workspace, properties_of
from nettorrent_mpi.device.gpu.known import KNOWN, convolution_workspace
from nettorrent_mpi.nn.convolutions import convolutions
from nettorrent_mpi.planning import load_config, plan

TYPES = [("float32", False), ("float32", True), ("float64", False), ("bfloat16", False)]

for path in sys.argv[1:]:
    planned = plan(load_config(path))
    network, options = planned.network, planned.setup.options
    for gpu, facts in KNOWN.items():
        properties = properties_of(facts)
        for dtype, tf32 in TYPES:
            most, count = 0, 0
            # Whole layers, and half of each layer's filters; a micro-batch's rows, and a smaller last one's.
            for cols, rows in ((1, options.batch_size), (2, options.batch_size), (1, options.batch_size // 2 + 1)):
                for kind, geometry, bias, relu in convolutions(network.stage(0, network.weight_layers, cols, 0)):
                    most = max(most, plan_workspace(properties, kind, geometry, rows, dtype, tf32, bias, relu))
                    count += 1
            print(path, gpu, "tf32" if tf32 else dtype, count, most)
            whole = convolutions(network.stage(0, network.weight_layers, 1, 0))
            assert convolution_workspace(gpu, whole, options.batch_size, dtype, tf32) <= most
