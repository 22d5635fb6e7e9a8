"""The geometry of kernels and windows on images (b, height, width, channels): pure arithmetic."""

from __future__ import annotations

from typing import Literal

from nettorrent_mpi.plan.records import dataclass

Pair = tuple[int, int]  # (of the height, of the width)


@dataclass(frozen=True)
class Geometry:
    """A convolution of one image: y[h, w, o] = sum over p, q, i of x[h * down + p - top, w * across + q - left, i] *
    weight[p, q, i, o].

    `image` and `output` are (height, width, channels) of x and y; the padding is (before, after).
    """

    image: tuple[int, int, int]
    output: tuple[int, int, int]
    kernel: Pair
    stride: Pair
    vertical: Pair
    horizontal: Pair

    @staticmethod
    def of(
        image: tuple[int, int, int], filters: int, kernel: Pair, stride: Pair, padding: Literal["valid", "same"]
    ) -> Geometry:
        """Return the geometry of a convolution with `filters` filters; for `valid` the kernel fits into the image."""
        high, *vertical = places(image[0], kernel[0], stride[0], padding)
        wide, *horizontal = places(image[1], kernel[1], stride[1], padding)
        before, after = zip(vertical, horizontal, strict=True)
        return Geometry(image, (high, wide, filters), kernel, stride, (before[0], after[0]), (before[1], after[1]))

    def __str__(self) -> str:
        sizes = ["x".join(map(str, shape)) for shape in (self.image, self.output, self.kernel, self.stride)]
        return f"{sizes[0]} to {sizes[1]} by {sizes[2]} every {sizes[3]} in {self.vertical}{self.horizontal}"


def places(size: int, kernel: int, stride: int, padding: Literal["valid", "same"]) -> tuple[int, int, int]:
    """Return (number of places, padding before, padding after) along one axis; for `valid`, kernel <= size.

    `same` has ceil(size / stride) places. An odd kernel is padded by kernel // 2 before, as in PyTorch's
    Conv2d(padding=kernel // 2), whatever the stride; an even one has the odd row or column at the end.
    """
    if padding == "valid":
        return (size - kernel) // stride + 1, 0, 0
    count = -(-size // stride)
    reach = (count - 1) * stride + kernel
    before = kernel // 2 if kernel % 2 else max(reach - size, 0) // 2
    return count, before, max(reach - size - before, 0)


@dataclass(frozen=True)
class Pooling:
    """Windows of `size`, `stride` apart, that slide over images of height x width without padding."""

    image: Pair
    size: Pair
    stride: Pair

    @property
    def count(self) -> Pair:
        """The number of windows, down and across; remainders at the edges are ignored."""
        (high, wide), (down, across) = self.size, self.stride
        return (self.image[0] - high) // down + 1, (self.image[1] - wide) // across + 1

    @property
    def taps(self) -> int:
        """The number of pixels in a window."""
        return self.size[0] * self.size[1]

    @property
    def apart(self) -> bool:
        """Whether every pixel lies in at most one window."""
        return self.size[0] <= self.stride[0] and self.size[1] <= self.stride[1]

    @property
    def tiles(self) -> bool:
        """Whether every pixel lies in exactly one window."""
        return self.size == self.stride and not any(self.image[axis] % self.size[axis] for axis in (0, 1))
