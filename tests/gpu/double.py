"""A device that gathers rows, of NumPy, until the real one does."""

from __future__ import annotations

from typing import Any

import numpy as np

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.device.gpu import Gpu
from tests.gpu.host.runtime import HostRuntime


class Double(Gpu):
    def __init__(self, seed: int):
        super().__init__(HostRuntime(seed, memory=1 << 30))
        self.arena.reserve(1 << 18)
        self.ops: Any = Rows(self)


class Rows:
    def __init__(self, device: Gpu):
        self.device = device
        self.runtime: Any = device.runtime

    def gather(self, images, numbers, out, factor, shift, *, key=None, flip=False, crop=False, resident=True):
        images, numbers, out, factor, shift, key = (
            None if a is None else self.runtime.within(a) for a in (images, numbers, out, factor, shift, key)
        )

        def run() -> None:
            raw = images[numbers] if resident else images
            raw = np.ascontiguousarray(raw).reshape(len(out), -1).view(np.uint8)
            if flip or crop:
                changed = np.empty_like(raw)
                names = [n for n, on in (("flip", flip), ("crop", crop)) if on]
                Augment(names, images.shape[1:]).apply(numbers, int(key[0]), raw, changed)
                raw = changed
            out[...] = raw.view(images.dtype).reshape(out.shape)
            out[...] = out * factor + shift

        self.device.stream.enqueue("gather", run)

    def take_rows(self, source, numbers, out):
        source, numbers, out = (self.runtime.within(a) for a in (source, numbers, out))

        def run():
            out[...] = source[numbers]

        self.device.stream.enqueue("take rows", run)

    def rows_of_step(self, step, orders, keys, numbers, key, *, steps_per_epoch, batch_size):
        orders, keys, step, numbers, key = (self.runtime.within(a) for a in (orders, keys, step, numbers, key))

        def run():
            epoch, batch = divmod(int(step[0]), steps_per_epoch)
            part = orders[epoch % len(orders), batch * batch_size : (batch + 1) * batch_size]
            numbers[: len(part)] = part
            key[0] = keys[epoch % len(keys)]

        self.device.stream.enqueue("rows of step", run)
