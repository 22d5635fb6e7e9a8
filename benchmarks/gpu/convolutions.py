"""Convolutions by cuDNN against float64: forward and both gradients, in every type, as they are launched and captured;
filters that lie as HWIO beside those that lie as KRSC; and how fast they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.gpu.on_device import ROUNDING, TYPES, OnDevice, check, error_of
from benchmarks.gpu.record import Record, Skipped
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.plan.errors import NoPlanError
from tests.gpu.host import convolution as reference

# (rows, image, filters, kernel, stride, padding): those of configs/, and some whose sizes divide nothing.
SHAPES: tuple[tuple[int, tuple[int, int, int], int, int, int, Any], ...] = (
    (16, (32, 32, 3), 32, 3, 1, "same"),
    (16, (32, 32, 32), 32, 3, 1, "valid"),
    (16, (15, 15, 64), 64, 3, 1, "valid"),
    (8, (32, 32, 16), 32, 3, 2, "same"),
    (8, (32, 32, 16), 32, 1, 2, "valid"),
    (3, (9, 7, 5), 11, 3, 1, "same"),
    (5, (8, 10, 4), 6, 2, 2, "same"),
    (1, (28, 28, 1), 8, 5, 1, "valid"),
)
KINDS = ("forward", "forward + bias", "forward + bias + relu", "grad_x", "grad_w")
FAST = (256, (32, 32, 64), 64, 3, 1, "same")


def run(record: Record) -> None:
    for name in TYPES:
        bench = OnDevice(name)  # for all of them: its library is loaded once
        for kind in KINDS:
            with record.case(f"{'strict ' if name == 'float32' else ''}{name}, {kind}") as figures:
                every_shape(figures, bench, kind)
        bench.device.close()
    for name in TYPES if not record.host else ():
        for kind in ("forward", "grad_x", "grad_w"):
            with record.case(f"rate in {name}, {kind}") as figures:
                figures.update(rate(name, kind))
    for name in ("float32", "tf32", "bfloat16") if not record.host else ():
        with record.case(f"filters as HWIO, {name}") as figures:
            figures.update(as_hwio(name))


def every_shape(figures: dict[str, Any], bench: OnDevice, kind: str) -> None:
    """Compare one kind of convolution of every shape. Raises WrongNumbers, or Skipped where there is no plan at all."""
    worst, missing = 0.0, []
    for rows, image, count, kernel, stride, padding in SHAPES:
        geometry = Geometry.of(image, count, (kernel, kernel), (stride, stride), padding)
        try:
            worst = max(worst, compared(bench, rows, geometry, kind))
        except NoPlanError as error:
            missing.append(str(error))
    figures |= {"error": worst, "of": "a rounding of the type, relative to the sum of magnitudes"}
    if missing:
        figures["without_plan"] = missing
    if len(missing) == len(SHAPES):
        raise Skipped(missing[0])
    check(worst, limit(bench.name))


def limit(name: str) -> float:
    """Return the largest error in roundings of the type: of factors and result, or of sums in some order."""
    return 4.5 if name in ("tf32", "bfloat16") else 32.0


def operands(bench: OnDevice, rows: int, geometry: Geometry) -> tuple[Array, Array, Array, Array]:
    """Return images, filters (KRSC), outputs and a bias, as the type rounds them, in float64."""
    rng = np.random.default_rng(rows)
    shapes = ((rows, *geometry.image), (geometry.output[2], *geometry.kernel, geometry.image[2]))
    x, weight = (bench.rounded(rng.standard_normal(shape)) for shape in shapes)
    y = bench.rounded(rng.standard_normal((rows, *geometry.output)))
    return x, weight, y, bench.rounded(rng.standard_normal(geometry.output[2]))


def compared(bench: OnDevice, rows: int, geometry: Geometry, kind: str) -> float:
    """Return the error of one convolution, in roundings of the type relative to the sum of the magnitudes. Raises
    WrongNumbers if a graph of it differs in any bit."""
    arrays = operands(bench, rows, geometry)
    bias, relu = "bias" in kind, "relu" in kind
    made = {"forward": 2, "grad_x": 0, "grad_w": 1}[kind.split(maxsplit=1)[0]]  # which of the arrays is computed
    found: list[Array] = []
    for captured in (False, True):
        x, weight, y, more = (bench.up(array) for array in arrays)
        ready = bench.device.runtime.convolution(
            kind.split(maxsplit=1)[0],
            x,
            weight,
            y,
            geometry,
            bias=more if bias else None,
            relu=relu,
            tf32=bench.device.tf32,
            workspace=bench.workspace,
        )
        if captured:
            bench.captured(lambda ready=ready: ready.run(bench.device.stream))()
        else:
            ready.run(bench.device.stream)
        found.append(bench.down((x, weight, y)[made]))
    check(float(not np.array_equal(*found)), 0)
    wanted, terms = (computed(kind, [np.array(array) for array in arrays], geometry, absolute) for absolute in (0, 1))
    return error_of(found[0], wanted, terms) / ROUNDING[bench.name]


def computed(kind: str, arrays: list[Array], geometry: Geometry, absolute: bool) -> Array:
    """Return what a convolution gives in float64; `absolute`: with the magnitudes of everything, without a relu."""
    x, weight, y, bias = (np.abs(array) for array in arrays) if absolute else arrays
    if kind == "grad_x":
        reference.grad_x(x, weight, y, geometry)
        return x
    if kind == "grad_w":
        reference.grad_w(x, weight, y, geometry)
        return weight
    reference.forward(x, weight, y, geometry, bias if "bias" in kind else None, "relu" in kind and not absolute)
    return y


def rate(name: str, kind: str) -> dict[str, float]:
    """Return the time and the rate of a convolution of many channels, replayed as a graph."""
    rows, image, count, kernel, stride, padding = FAST
    geometry = Geometry.of(image, count, (kernel, kernel), (stride, stride), padding)  # type: ignore[arg-type]
    bench = OnDevice(name)
    x, weight, y, _ = (bench.up(array) for array in operands(bench, rows, geometry))
    ready = bench.device.runtime.convolution(
        kind, x, weight, y, geometry, tf32=bench.device.tf32, workspace=bench.workspace
    )
    seconds = bench.seconds(bench.captured(lambda: ready.run(bench.device.stream)))
    bench.device.close()
    high, wide, outputs = geometry.output
    work = 2 * rows * high * wide * outputs * kernel**2 * image[2]
    return {"seconds_each": seconds, "teraflops": work / seconds / 1e12}


def as_hwio(name: str) -> dict[str, Any]:
    """Return the error and the time of a forward pass whose filters lie as (height, width, inputs, outputs), beside the
    time with KRSC."""
    import cudnn

    from nettorrent_mpi.device.gpu import cudnn as ours

    rows, image, count, kernel, stride, padding = FAST
    geometry = Geometry.of(image, count, (kernel, kernel), (stride, stride), padding)  # type: ignore[arg-type]
    bench = OnDevice(name)
    arrays = operands(bench, rows, geometry)
    x, weight, y, _ = (bench.up(array) for array in arrays)
    hwio = bench.up(arrays[1].transpose(1, 2, 3, 0))
    graph = hwio_graph(cudnn.create_device_properties(0), geometry, rows, name)
    space, handle = bench.workspace(max(graph.get_workspace_size(), 1)), cudnn.create_handle()
    address, stream = bench.device.runtime.address, bench.device.stream
    addresses = {ours.X: address(x), ours.FILTERS: address(hwio), ours.Y: address(y)}

    def forward() -> None:
        cudnn.set_stream(handle=handle, stream=stream.handle)  # type: ignore[attr-defined]
        graph.execute(addresses, address(space), handle)

    forward()
    wanted, terms = (
        computed("forward", [np.array(array) for array in arrays], geometry, absolute) for absolute in (0, 1)
    )
    error = error_of(bench.down(y), wanted, terms) / ROUNDING[name]
    ready = bench.device.runtime.convolution(
        "forward", x, weight, y, geometry, tf32=bench.device.tf32, workspace=bench.workspace
    )
    found = {
        "error": error,
        "seconds_hwio": bench.seconds(bench.captured(forward)),
        "seconds_krsc": bench.seconds(bench.captured(lambda: ready.run(stream))),
    }
    bench.device.close()
    check(error, limit(name))
    return found


def hwio_graph(properties: Any, geometry: Geometry, rows: int, name: str) -> Any:
    """Return cuDNN's graph of a forward pass with filters as HWIO. Needs no GPU."""
    import cudnn

    from nettorrent_mpi.device.gpu import cudnn as ours

    kind = cudnn.data_type.BFLOAT16 if name == "bfloat16" else cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        device_property=properties,
    )
    (high, wide), inputs, outputs = geometry.kernel, geometry.image[2], geometry.output[2]
    images, out = ours._images(rows, geometry.image), ours._images(rows, geometry.output)
    x = graph.tensor(name="x", uid=ours.X, **images)
    weight = graph.tensor(
        name="weight",
        uid=ours.FILTERS,
        dim=[outputs, inputs, high, wide],
        stride=[1, outputs, wide * inputs * outputs, inputs * outputs],
    )
    y = graph.conv_fprop(
        image=x,
        weight=weight,
        pre_padding=[geometry.vertical[0], geometry.horizontal[0]],
        post_padding=[geometry.vertical[1], geometry.horizontal[1]],
        stride=list(geometry.stride),
        dilation=[1, 1],
    )
    y.set_dim(out["dim"]).set_stride(out["stride"]).set_output(True).set_data_type(kind).set_uid(ours.Y)
    notes = cudnn.numerical_note
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS] if name == "float32" else [])
    graph.build_plans()
    return graph
