"""The operations on arrays, by name: every device implements all of them, and code above computes in no other way.

`out`, and arrays written x <- ..., are changed in place; nothing is allocated in the steady state. Arrays are
C-contiguous unless stated otherwise. `_grad` is the backward of a forward: dy is the gradient with respect to its
output, dx to its input. Suffixes: b rows of a micro-batch, n rows times positions, c channels (the last axis), O
outputs.
"""

from __future__ import annotations

from typing import Protocol

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.device.geometry import Geometry, Pooling
from nettorrent_mpi.plan.blocks import Span


class FlatOps(Protocol):
    """Operations on flat arrays of one type and length: parameters, gradients, optimizer states, messages."""

    def copy(self, out: Array, x: Array) -> None:
        """out <- x, which may be of another type, or a strided view; x is broadcast."""

    def fill(self, out: Array, value: float) -> None:
        """Every element of out <- value."""

    def add(self, a: Array, b: Array, out: Array) -> None:
        """out <- a + b (of any shapes that broadcast)."""

    def subtract(self, a: Array, b: Array, out: Array) -> None:
        """out <- a - b (of any shapes that broadcast)."""

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """out <- a * b (of any shapes that broadcast)."""

    def scale(self, x: Array, factor: float) -> None:
        """x <- factor * x."""

    def divide(self, x: Array, divisor: float) -> None:
        """x <- x / divisor, rounded once."""

    def store(self, out: Array, x: Array, accumulate: bool) -> None:
        """out <- x, or out + x with `accumulate`."""

    def move(self, x: Array, share: float, towards: Array, origin: Array | None = None) -> None:
        """x <- x + share * (towards - origin); without `origin`: x <- x + share * (towards - x)."""

    def withhold(self, x: Array, before: Array, kept: Array, part: float) -> None:
        """Take back `part` of the change of x since `before`, and add it to `kept`."""

    def increase(self, x: Array, by: float) -> None:
        """x[0] <- x[0] + by."""

    def sum_of_squares(self, x: Array, total: Array) -> None:
        """total[0] (float64) <- total[0] + the sum of the squares, computed in float64 for all types."""

    def clip_scale(self, total: Array, limit: float, scale: Array) -> None:
        """scale[0] <- the factor that limits gradients whose squares sum to total[0] to the norm `limit`; both float64.

        The formula of torch.nn.utils.clip_grad_norm_, limit / (norm + 1e-6) and at most 1; nan if the norm is nan.
        """

    def all_finite(self, x: Array) -> bool:
        """Whether no element is infinite or NaN. The host waits for the answer: for use at rest."""

    def count_nonfinite(self, y: Array, count: Array, step: Array) -> None:
        """Unless the sum of y (of any shape) is finite: count[0] <- count[0] + 1, and count[1] <- step[0] if count[0]
        was 0. All numbers are float64."""


class MessageOps(Protocol):
    """Lossy compression of flat float32 or float64 arrays into messages (uint8) that are aligned to 4 bytes.

        float16  each value rounded to the nearest float16, or to +-65504 beyond
        int8     of each block of 1024 values the largest magnitude / 127 (float32), all scales first; then each value
                 as the nearest multiple of its block's scale
        sign     of each block of 128 values the mean magnitude (float32) without the largest, all scales first; then
                 each block's largest value in magnitude (float32), its places (uint8), and all signs, a bit for each
                 (0 is +)
        topk     the indices (uint32) of the values that are largest in magnitude, as many as fit into the message, in
                 ties the first ones; then these values (float32)

    Non-finite values count as 0: they are not encoded and do not affect other values, so the neighbours of a replica
    that diverged see it stand still. Values beyond a codec's range are clipped (float16: to 65504, the others: to
    3e35), and the rest follows in later messages. float16 sends 0 below 3e-8, int8 below 1e-38.
    """

    def encode(self, kind: str, values: Array, message: Array) -> None:
        """Encode `values`, which stay unchanged, into `message`."""

    def decode_add(self, kind: str, message: Array, estimate: Array) -> None:
        """Add the decoded message to `estimate`; bit for bit the same on every rank.

        `estimate` has the size and type of the encoded values.
        """


class LayerOps(Protocol):
    """Operations of layers."""

    def matmul(
        self, a: Array, b: Array, out: Array, turn_a: bool = False, turn_b: bool = False, accumulate: bool = False
    ) -> None:
        """Compute out_mn <- (or +=) a_mk @ b_kn. With `turn_a` a is given as (k, m), with `turn_b` b as (n, k).

        a and b may be some columns of matrices. The first axis of `a` may differ from call to call; the objects of the
        steady state are cached.
        """

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> None:
        """y_bo <- x_bI @ weight_Io, plus the bias, and with `relu` max(., 0) of that."""

    def sum_rows(self, x: Array, out: Array, accumulate: bool = False) -> None:
        """out_c <- (or +=) the sum of x (b, ..., c) over all but its last axis; out may be of a wider type."""

    def convolve(
        self, x: Array, weight: Array, bias: Array | None, y: Array, geometry: Geometry, relu: bool = False
    ) -> None:
        """y <- the convolution of the images x with weight (height, width, inputs, outputs), plus the bias, and with
        `relu` max(., 0) of that."""

    def convolve_grad_x(self, weight: Array, dy: Array, dx: Array, geometry: Geometry) -> None:
        """dx <- the convolution's gradient with respect to x."""

    def convolve_grad_w(self, x: Array, dy: Array, dw: Array, geometry: Geometry, accumulate: bool) -> None:
        """dw <- (or +=) the convolution's gradient with respect to the weights."""

    def relu(self, x: Array, y: Array) -> None:
        """y <- max(x, 0), NaN where x is; here and in the other activations y may be x itself."""

    def relu_grad(self, y: Array, dy: Array) -> None:
        """dy <- dy where y > 0, elsewhere 0."""

    def relu_grad_sum(self, y: Array, dy: Array, total: Array, accumulate: bool = False) -> None:
        """`relu_grad`; then total_c <- (or +=) the sum of dy (b, ..., c), as `sum_rows` has it."""

    def leaky_relu(self, x: Array, y: Array, slope: float) -> None:
        """y <- x where it is positive, slope * x elsewhere; 0 <= slope <= 1."""

    def leaky_relu_grad(self, y: Array, dy: Array, slope: float) -> None:
        """dy <- dy where y > 0, elsewhere slope * dy."""

    def sigmoid(self, x: Array, y: Array) -> None:
        """y <- 1 / (1 + exp(-x))."""

    def sigmoid_grad(self, y: Array, dy: Array) -> None:
        """dy <- dy * y * (1 - y)."""

    def tanh(self, x: Array, y: Array) -> None:
        """y <- tanh(x)."""

    def tanh_grad(self, y: Array, dy: Array) -> None:
        """dy <- dy * (1 - y^2)."""

    def gelu(self, x: Array, y: Array, slope: Array | None) -> None:
        """y <- x * Phi(x), Phi the normal distribution function; slope <- the derivative Phi(x) + x * phi(x)."""

    def place_codes(self, shape: Shape, part: Span) -> Array:
        """Return a hash of the index of each feature in a row of `shape`, whose last axis is held in `part`: uint32,
        flat.

        It depends on the layer alone, so it is computed once.
        """

    def keep_mask(self, keep: Array, codes: Array, rate: float, key: int, step: Array, rows: Span) -> None:
        """Compute keep (rows, features), bool <- True with probability 1 - rate (rounded to 2^-32).

        Each element is a hash of (key, step[0], its global row, the code of its place), independent of the rank.
        """

    def drop(self, y: Array, keep: Array, scale: float) -> None:
        """y <- scale * y where `keep`, elsewhere 0."""

    def inverse_root(self, x: Array, eps: float) -> None:
        """x <- 1 / sqrt(x + eps)."""

    def moments(self, x: Array, part: Array) -> None:
        """Compute part (1 + 2 c), float64 <- the number of rows and positions of x (b, ..., c), the sum over them for
        each channel, and the sum of the squared deviations from the mean of these."""

    def merge_moments(
        self,
        parts: Array,
        mean: Array,
        scale: Array,
        running_mean: Array,
        running_var: Array,
        momentum: float,
        eps: float,
    ) -> None:
        """Compute mean_c and scale_c = 1 / sqrt(variance + eps), float64, of all rows from the `moments` of parts of
        them (members, 1 + 2 c): deviations from different means are put together as by Chan, Golub and LeVeque (1983).

        With a momentum, running_mean moves by it towards the mean, running_var towards the unbiased variance.
        """

    def normalize(self, x: Array, mean: Array, scale: Array, weight: Array, bias: Array, y: Array) -> None:
        """y <- (x - mean_c) * weight_c * scale_c + bias_c; mean and scale are float64."""

    def norm_sums(self, x: Array, dy: Array, mean: Array, scale: Array, sums: Array) -> None:
        """sums (2, c), float64 <- the sums of (x - mean_c) * scale_c * dy and of dy over all but the last axis."""

    def norm_grad(self, x: Array, dy: Array, mean: Array, scale: Array, weight: Array, sums: Array, count: int) -> None:
        """dy <- dx = weight * scale * (dy - mean of dy - xhat * mean of (dy * xhat)), xhat = (x - mean) * scale.

        `sums` are those of `norm_sums` over all `count` positions, and are overwritten; with a count of 0 the mean and
        scale are constants.
        """

    def sum_features(self, x: Array, total_n: Array) -> None:
        """total_n <- the sum of x over its last axis."""

    def center(self, x: Array, mean_n: Array, y: Array, squares_n: Array) -> None:
        """y <- x - mean_n; squares_n <- the sum of y^2 over the last axis."""

    def scale_features(self, y: Array, scale_n: Array, weight: Array, bias: Array) -> None:
        """y <- y * scale_n * weight_c + bias_c."""

    def layer_norm_sums(
        self, x: Array, dy: Array, mean_n: Array, scale_n: Array, weight: Array, gradients: Array, sums: Array
    ) -> None:
        """gradients (2, c) <- the sums over n of dy * xhat and of dy, where xhat = (x - mean_n) * scale_n.

        Then dy <- weight * dy, and sums (2, n) <- the sums over c of dy * xhat and of dy as it is then.
        """

    def layer_norm_grad(self, x: Array, dy: Array, mean_n: Array, scale_n: Array, sums: Array) -> None:
        """dy <- dx = scale_n * (dy + xhat * sums[0] + sums[1]), dy being what `layer_norm_sums` made of it."""

    def max_pool(self, x: Array, y: Array, winner: Array | None, pooling: Pooling, relu: bool = False) -> None:
        """y <- the largest number of each window, NaN if there is one; winner <- its first place in the window.

        With `relu` that of max(x, 0), and the winner of a window without a number above 0, whose gradient nobody gets,
        is no place, but the largest number of its type.
        """

    def max_pool_grad(self, dy: Array, winner: Array, dx: Array, pooling: Pooling) -> None:
        """dx <- dy at the winners, elsewhere 0."""

    def avg_pool(self, x: Array, y: Array, pooling: Pooling) -> None:
        """y <- the mean of each window."""

    def avg_pool_grad(self, dy: Array, dx: Array, pooling: Pooling) -> None:
        """dx <- the gradient of the means; dy is overwritten."""

    def global_avg_pool(self, x: Array, y: Array) -> None:
        """y (b, c) <- the mean of each channel of the images x."""

    def global_avg_pool_grad(self, dy: Array, dx: Array) -> None:
        """dx <- the gradient of the means; dy is overwritten."""


class CriterionOps(Protocol):
    """Operations of losses. They add to `metrics`: [0] the sum of the rows' losses, [1] the number of correct rows.

    If dy_bO is given, it gets the gradient of the sum of losses over `total_1`, a number (float64) on the device: the
    number of rows makes it the mean.
    """

    def cross_entropy(
        self, y_bO: Array, labels_b: Array, smoothing: float, total_1: Array, dy_bO: Array | None, metrics: Array,
        weights_O: Array | None = None,
    ) -> None:  # fmt: skip
        """Compute the negative log likelihood of the labels after softmax, with `smoothing` spread over all outputs.

        With weights of the classes (float32, or float64 where y_bO is), every class's log likelihood is multiplied by
        its weight, and metrics[4] is increased by the sum of (weight of the label - 1).
        """

    def binary_cross_entropy(
        self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array
    ) -> None:
        """Compute the mean of each row of -t log s(y) - (1 - t) log(1 - s(y)), s being the sigmoid and t the wanted
        value."""

    def squared_error(self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array) -> None:
        """Compute the mean of each row of (y - wanted)^2."""

    def one_hot(self, labels_b: Array, out_bO: Array) -> None:
        """out <- 1 where the label is, elsewhere 0."""

    def count_right(self, y_bO: Array, labels_b: Array, metrics: Array) -> None:
        """Count the rows whose largest output is the label's."""

    def count_same_side(self, y_bO: Array, wanted_bO: Array, metrics: Array) -> None:
        """Count the elements that are above 0 exactly where the wanted value is above 1/2."""


class UpdateOps(Protocol):
    """One step of an optimizer on flat arrays, with the gradients scale[0] * g + decay * p; g stays unchanged.

    What changes from step to step comes in arrays of float64 on the device: `numbers`, and `scale` (None: 1). Each
    number is rounded to the type of p before it is used.
    """

    def sgd(self, p: Array, g: Array, numbers: Array, scale: Array | None = None, decay: float = 0.0) -> None:
        """p <- p - rate g, with numbers = (rate,)."""

    def momentum(
        self, p: Array, g: Array, b: Array, numbers: Array, nesterov: bool, scale: Array | None = None,
        decay: float = 0.0,
    ) -> None:  # fmt: skip
        """b <- beta b + share g; p <- p - rate b, with Nesterov p - rate (g + ahead b); numbers = (rate, beta, share,
        ahead)."""

    def adagrad(
        self, p: Array, g: Array, s: Array, numbers: Array, eps: float, scale: Array | None = None, decay: float = 0.0
    ) -> None:
        """s <- s + g^2; p <- p - rate g / (sqrt(s) + eps), with numbers = (rate,)."""

    def rmsprop(
        self, p: Array, g: Array, s: Array, a: Array | None, b: Array | None, numbers: Array, alpha: float, eps: float,
        beta: float, scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        """With numbers = (rate,): s <- alpha s + (1 - alpha) g^2; d = g / (sqrt(s) + eps); p <- p - rate d.

        With a: a <- alpha a + (1 - alpha) g, and sqrt(s - a^2) in place of sqrt(s). With b: b <- beta b + d; p <- p -
        rate b.
        """

    def adam(
        self, p: Array, g: Array, m: Array, v: Array, numbers: Array, rest1: float, b2: float, rest2: float,
        scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        """m <- m + rest1 (g - m); v <- b2 v + rest2 g^2; p <- shrink p - rate m / (sqrt(v) + eps), with numbers =
        (rate, eps, shrink)."""


class Ops(FlatOps, MessageOps, LayerOps, CriterionOps, UpdateOps, Protocol):
    """All operations of a device."""
