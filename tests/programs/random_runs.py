"""random_runs.py COUNT SEED [FIRST]: COUNT training runs, each of a configuration drawn from SEED and its number.

All ranks of one mpirun (8 are meant) take part. A run has the first 1..8 of them, and goes the way of the command line
from the configuration's file to summary.json, in a temporary folder; the other ranks wait. Some runs are resumed, in
another mode and on another number of ranks. Each has to end with exit code 0, a finite loss and finite weights. What
fails is told with its configuration, and so is a run that is not done after PATIENCE seconds, which ends all.
`random_runs.py 1 SEED N` repeats number N.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import math
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nettorrent_mpi import env
from nettorrent_mpi.plan.pairing import possible

RANKS = 8
PATIENCE = 40.0  # seconds that a run may take on a busy machine; it needs less than one
LARGE = 100.0  # no loss here begins with more than 3
MICRO_BATCHES = 4  # the most of `micro_batches: auto`, where there are not more stages

PIPELINES = ["gpipe", "1f1b", "zero_bubble", {"zero_bubble": 2}, {"zero_bubble": 7}, "async", {"async": True}]

Plain = dict[str, Any]
ORIGINALS: dict[str, Any] = {}  # what runs replace


class Run(NamedTuple):
    """One training: on the first `ranks`, of this configuration, anew or from the checkpoint of the one before. `nodes`
    gives for each rank the one that is first on its node; on several of them buckets are small, so that there are many.
    """

    ranks: int
    config: Plain
    resume: bool
    nodes: list[int]

    def __str__(self) -> str:
        return f"{self.ranks} ranks on nodes {self.nodes}{', resumed' * self.resume}: {json.dumps(self.config)}"


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(seed: int, number: int) -> list[Run]:
    """The runs of a case: one, or one and its continuation. The same on every rank."""
    dice = random.Random(f"{seed} {number}")
    model, layers = _model(dice)
    replicas, ranks, layout = _layout(dice, layers)
    exchange, pipeline = _exchange(dice, replicas), dice.choice(PIPELINES)
    data = {
        "name": "synthetic",
        "rows": dice.randint(40, 160),
        "test_rows": dice.choice([0, 1, 17, 30]),
        "classes": 3,
        "shape": model.pop("shape"),
        "validation": dice.choice([0.1, 0.2, 0.34] if "elite" in exchange else [0.0, 0.0, 0.2]),
        "partition": dice.choice(["shared", "disjoint"]),
    }
    pieces = dice.choice(["auto", 1, 2, 3, 5])
    fewest = max(MICRO_BATCHES, layers) if pieces == "auto" else pieces
    # every replica needs a row of a micro-batch; a resumed run has no more replicas than this one
    batch_size = fewest * (replicas - 1) + dice.randint(1, 24) if replicas > 1 else fewest + dice.randint(0, 24)
    if "batch_norm" in model["layers"]:  # two rows
        batch_size += fewest * (replicas + 1)
    train = {
        "batch_size": batch_size,
        "micro_batches": pieces,
        "optimizer": dice.choice(
            [
                {"adam": 0.003},
                {"sgd": {"lr": 0.02, "momentum": 0.9}},
                {"rmsprop": 0.001},
                {"adagrad": 0.01},
                {"sgd": 0.05},
            ]
        ),
        "schedule": dice.choice(["constant", {"cosine": {"warmup_steps": 3}}, {"exponential": 0.8}]),
        "report_every": dice.choice([1, 3, 50]),
        "evaluate_every": dice.randint(1, 2),
    }
    if "async" not in pipeline and dice.random() < 0.3:
        train["clip_norm"] = dice.choice([0.5, 5.0])
    if dice.random() < 0.1 and (data["test_rows"] or data["validation"]):
        train["stop_at"] = {"accuracy": 0.4}
    steps = dice.randint(1, 24)
    config = {
        "seed": dice.randint(0, 1000),
        "dtype": dice.choice(["float32", "float64"]),
        "checkpoint": {"every_epochs": dice.choice([None, 1, 2]), "every_steps": dice.choice([None, 3])},
        "trace": dice.random() < 0.1,
        "data": data,
        "model": model,
        "train": train | _length(dice, data, batch_size, steps),
        "layout": layout,
        "pipeline": pipeline,
        "exchange": exchange,
    }
    runs = [Run(ranks, config, False, _nodes(dice, ranks))]
    if dice.random() < 0.25:
        replicas, ranks, layout = _layout(dice, layers, replicas)
        exchange = _exchange(dice, replicas, validation=data["validation"] > 0)
        more = {"layout": layout, "exchange": exchange, "train": train | {"steps": 2 * steps + 20}}
        runs.append(Run(ranks, config | more, True, _nodes(dice, ranks)))
    return runs


def _nodes(dice: random.Random, ranks: int) -> list[int]:
    """One node, or several of any sizes."""
    if dice.random() < 0.5:
        return [0] * ranks
    firsts = [rank == 0 or dice.random() < 0.35 for rank in range(ranks)]
    return [max(first for first in range(rank + 1) if firsts[first]) for rank in range(ranks)]


def _length(dice: random.Random, data: Plain, batch_size: int, steps: int) -> Plain:
    """Some epochs, where these are short; a run that would end in its warm-up has none."""
    epoch = -(-round(data["rows"] * (1 - data["validation"])) // batch_size)
    epochs = dice.randint(1, 2) if epoch <= 10 and dice.random() < 0.5 else 0
    length = {"epochs": epochs} if epochs else {"steps": steps}
    return length | ({"schedule": "cosine"} if (epochs * epoch or steps) < 5 else {})


def _model(dice: random.Random) -> tuple[Plain, int]:
    """(the network, with the shape of its inputs; how many weight layers it has)."""
    layers: list[Any] = []
    count = 0
    if dice.random() < 0.5:
        shape = dice.choice([[8, 8, 2], [7, 6, 1]])
        bias = dice.random() < 0.5
        layers.append({"conv2d": {"filters": dice.randint(8, 11), "padding": "same", "bias": bias}})
        layers += [dice.choice(["batch_norm", "layer_norm"]), "relu", {"max_pool2d": 2}]
        count = 1
        if dice.random() < 0.4:
            layers.append({"conv2d": {"filters": 8, "activation": "tanh", "padding": "same"}})
            count += 1
        if dice.random() < 0.3:
            layers.append(
                {"residual": [{"conv2d": {"filters": 8 if count == 2 else _filters(layers), "padding": "same"}}]}
            )
            count += 1
        layers += [dice.choice([{"dropout": 0.2}, "gelu"]), dice.choice(["flatten", "global_avg_pool2d"])]
    else:
        shape = dice.choice([[5], [4, 3], [6, 6, 1]])
        layers += ["flatten"] if len(shape) > 1 else []
    for _ in range(dice.randint(1, 3)):
        layers.append({"linear": {"units": dice.randint(8, 20), "activation": dice.choice(["relu", "tanh"])}})
        count += 1
        layers += dice.choice([[], [], ["batch_norm"], ["layer_norm"], [{"dropout": 0.3}]])
    layers.append({"linear": 8})  # so many units as there are ranks, and some more than classes
    loss = dice.choice(["cross_entropy", {"cross_entropy": 0.1}, "mean_squared_error", "binary_cross_entropy"])
    return {"shape": shape, "layers": layers, "loss": loss}, count + 1


def _filters(layers: list[Any]) -> int:
    return int(layers[0]["conv2d"]["filters"])


def _layout(dice: random.Random, layers: int, most: int = RANKS) -> tuple[int, int, Any]:
    """(replicas, ranks, layout), with at most `most` replicas."""
    stages = dice.randint(1, min(layers, 4))
    replicas = min(dice.choice([1, 2, 2, 3, 4, 5, 8]), RANKS // stages, most)
    each = RANKS // replicas
    if dice.random() < 0.3:
        ranks = replicas * dice.randint(1, each)
        return replicas, ranks, {"replicas": replicas} if replicas > 1 else "layers"
    cuts = [0, *sorted(dice.sample(range(1, layers), stages - 1)), layers]
    sizes = [1] * stages
    for _ in range(dice.randint(0, each - stages)):
        sizes[dice.randrange(stages)] += 1
    swarms = []
    for stage, size in enumerate(sizes):
        rows = dice.choice([n for n in range(1, size + 1) if size % n == 0])
        swarms.append({"layers": cuts[stage + 1] - cuts[stage], "rows": rows, "cols": size // rows})
    return replicas, replicas * sum(sizes), {"replicas": replicas, "swarms": swarms}


def _exchange(dice: random.Random, replicas: int, *, validation: bool = True) -> Plain:
    """Any exchange that so many replicas can have."""
    kind = dice.choice(["gossip"] * 5 + ["elite"] * 2 + ["none", "allreduce"])
    if kind == "elite" and replicas > 1 and validation:
        options: Plain = {
            "every_samples": dice.choice([1, 40, 1000]),
            "mode": dice.choice(["best", "tournament"]),
            "metric": dice.choice(["validation_loss", "validation_accuracy"]),
        }
        return {kind: options}
    if kind == "gossip" and replicas > 1:
        return {kind: _gossip(dice, replicas)}
    return {"none" if kind == "none" else "allreduce": {}}


def _gossip(dice: random.Random, replicas: int) -> Plain:
    some = [
        "constant", {"constant": 0.4}, "clock", "loss", {"linear": {"target": 7}}, "loss_divergence", "push_sum"
    ]  # fmt: skip
    options: Plain = {
        "pairing": dice.choice(possible(replicas)),
        "every": dice.choice([1, 1, 2, 5]),
        "probability": dice.choice([1.0, 1.0, 0.6]),
        "part": dice.choice(["auto", 1.0, 0.3, 0.07]),
        "overlap": dice.random() < 0.6,
        "deadline": dice.choice(["auto", "none", 0.3, 20.0]),
        "divergence_threshold": dice.choice([0.0, 0.0, 2.0]),
        "rate_factor": dice.choice(["auto", "auto", 0.5, 2.0]),
        "withhold": dice.choice(["auto", "auto", 0.0, 0.6]),
    }
    if dice.random() < 0.4 and options["pairing"] != "random":
        options["compress"] = dice.choice(["float16", "int8", "sign", {"topk": 0.05}, {"topk": 0.5}])
        options["gamma"] = dice.choice([None, 0.3])
    else:
        options["mix"] = dice.choice(some)
        options["average"] = dice.choice([["parameters"], ["parameters", "optimizer"]])
    if dice.random() < 0.4:
        options["exact_every"] = dice.choice([1, 3, 8])
        options["slow_momentum"] = dice.choice([0.0, 0.5])
    if dice.random() < 0.25:
        options["consensus"] = {"max": dice.choice([0.001, 0.05])}
    return options


# -- running -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(rank: int, what: str) -> Iterator[None]:
    """Ends all ranks, with what each of them is doing, where the inside takes longer than PATIENCE."""
    from mpi4py import MPI

    def end() -> None:
        sys.stderr.write(f"NOT DONE AFTER {PATIENCE:.0f} s: {what}\n")
        sys.stderr.flush()
        time.sleep(3)  # the others write down where they are
        MPI.COMM_WORLD.Abort(1)

    timer = threading.Timer(PATIENCE, end)
    if rank == 0:
        timer.start()
    faulthandler.dump_traceback_later(PATIENCE + 1)
    yield
    faulthandler.cancel_dump_traceback_later()
    timer.cancel()


def main(count: int, seed: int, first: int) -> int:
    env.prepare()
    from mpi4py import MPI

    from nettorrent_mpi.comm.world import World

    everyone = World()
    failed = 0
    began = time.perf_counter()
    for number in range(first, first + count):
        folder = everyone.comm.bcast(Path(tempfile.mkdtemp(prefix="random_run_")) if everyone.rank == 0 else None)
        problem = None
        for run in draw(seed, number):
            what = f"number {number} of seed {seed}, {run}"
            start = time.perf_counter()
            with watched(everyone.rank, what):
                comm = everyone.comm.Split(0 if everyone.rank < run.ranks else MPI.UNDEFINED)
                problem = train(comm, folder, run, what) if comm != MPI.COMM_NULL else None
                together = everyone.comm.Ibarrier()
                while not together.Test():
                    time.sleep(0.002)  # leaves the cores to those who train
                problem = everyone.comm.bcast(problem)
            if everyone.rank == 0:
                seconds = time.perf_counter() - start
                told = f"FAILED {what}\n{problem}\nrun folder: {folder}" if problem else f"ok {seconds:.2f} s {what}"
                sys.stdout.write(told + "\n")
                sys.stdout.flush()
            if problem:
                failed += 1
                break
        if everyone.rank == 0 and not problem:
            shutil.rmtree(folder)
    if everyone.rank == 0:
        sys.stdout.write(f"{count - failed} of {count} are well, in {time.perf_counter() - began:.0f} s\n")
    return 1 if failed else 0


def shared_memories() -> set[int]:
    """Return the set that holds, from now on, the pieces of shared memory that exist."""
    from nettorrent_mpi.comm.shared import SharedMemory

    found: set[int] = set()
    make, free = ORIGINALS.setdefault("SharedMemory", (SharedMemory.__init__, SharedMemory.free))

    def made(self: Any, *args: Any) -> None:
        make(self, *args)
        found.add(id(self))

    def freed(self: Any) -> None:
        free(self)
        found.remove(id(self))

    SharedMemory.__init__, SharedMemory.free = made, freed  # type: ignore[method-assign]
    return found


def train(comm: Any, folder: Path, run: Run, what: str) -> str | None:
    """One run on the ranks of `comm`; on rank 0 what is wrong with it."""
    from nettorrent_mpi.__main__ import main as nettorrent
    from nettorrent_mpi.cli import ranks
    from nettorrent_mpi.comm.world import World
    from nettorrent_mpi.engine import bucket_maker

    ORIGINALS.setdefault("buckets", (bucket_maker.FULL, bucket_maker.LEAST_SHARD))
    config, told = folder / "config.yaml", io.StringIO()
    if comm.rank == 0:
        config.write_text(json.dumps(run.config))
    comm.Barrier()
    world, memories = World(comm), shared_memories()
    world.nodes = tuple(run.nodes)
    bucket_maker.FULL, bucket_maker.LEAST_SHARD = (500, 100) if len(set(run.nodes)) > 1 else ORIGINALS["buckets"]

    def abort(code: int) -> None:  # also after what is told in one line
        sys.stderr.write(f"ENDED BY RANK {comm.rank}: {what}\n")
        type(world).abort(world, code)

    world.abort = abort  # type: ignore[method-assign]
    ranks.World = lambda: world  # type: ignore[assignment, misc]
    try:
        with contextlib.redirect_stdout(told):
            arguments = ["train", str(config), "--output", str(folder / "run"), *(["--resume"] if run.resume else [])]
            code = nettorrent(arguments)
    except BaseException:
        traceback.print_exc()
        world.abort(1)
        raise
    codes = comm.gather(code)
    assert not memories, "shared memory is left"
    assert not world.comm, "the world is left"
    problem = None
    if comm.rank == 0:
        wrong = f"exit codes {codes}" if any(codes) else wrong_in(folder / "run", run)
        problem = f"{wrong}\n{told.getvalue()}" if wrong else None
    comm.Free()
    return problem


def wrong_in(folder: Path, run: Run) -> str | None:
    """What is wrong in the folder of a run that ended well."""
    import numpy as np

    from nettorrent_mpi.engine.model_file import read_arrays

    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = run.config["train"].get("steps")
    if not summary["final_loss"] < LARGE or not math.isfinite(summary["test_loss"] or 0.0):
        return f"the loss is {summary['final_loss']}, the test loss {summary['test_loss']}"
    if not lines or lines[-1]["step"] != summary["steps"]:
        return f"ended by {summary['stopped_by']} after {summary['steps']} steps, which metrics.jsonl does not tell"
    if summary["stopped_by"] == "steps" and summary["steps"] != steps:
        return f"{summary['steps']} steps, not {steps}"
    if [line["step"] for line in lines] != sorted({line["step"] for line in lines}):
        return f"told after steps {[line['step'] for line in lines]}"
    if (summary["test_loss"] is None) != (run.config["data"]["test_rows"] == 0):
        return f"the test loss is {summary['test_loss']}"
    bad = [key for key, array in read_arrays(folder / "model.h5").items() if not np.isfinite(array).all()]
    return f"not finite: {', '.join(bad)}" if bad else None


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(given[0], given[1], given[2] if len(given) > 2 else 0))
