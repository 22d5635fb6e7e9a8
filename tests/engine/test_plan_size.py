"""The plan of one rank of a hundred thousand takes little time and memory, and has the lists of the whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.actions import step_end
from nettorrent_mpi.plan.exchange_specs import Gpipe, OneFOneB, ZeroBubble
from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.specs import CrossEntropy, Linear, Sgd, Spec
from nettorrent_mpi.plan.topology import Stage, Topology

RANKS = 100_000
LAYOUTS = ["layers", "auto", f"{{replicas: {RANKS // 5}}}", f"{{swarms: [{{layers: 5, rows: {RANKS}, cols: 1}}]}}"]
# CPU seconds and MB that one rank's plan takes, above what was measured: at most 0.2 s and 11 MB.
SECONDS, MEGABYTES = 2.0, 20.0

PROGRAM = """
import json, sys, time
from nettorrent_mpi import Linear
from nettorrent_mpi.config.sections import Data
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.engine.stage_schedule import StageSchedule
from nettorrent_mpi.engine.usage import peak_memory
from nettorrent_mpi.planning import load_config
ranks, layout, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
layers = ["flatten", *({"linear": {"units": units}} for units in (64, 32, 32, 32, 10))]
config = load_config(None, "train.batch_size=200000", f"layout={layout}", "data={name: synthetic, rows: 400000}",
                     "model.layers=" + json.dumps(layers))
memory, began = peak_memory(), time.process_time()
setup = set_up(config, ranks, planning=True, device=device)
topology, rank = setup.topology, ranks - 1
place = topology.place(rank)
schedule = StageSchedule(setup.plan, place.stage)
actions = schedule.step(first=True, left=1, parts=False)
groups = [topology.swarm(place.stage), topology.exact_group(place.stage, place.col), topology.replica(place.replica),
          topology.team(place.replica, place.stage), topology.peers(*place[1:]),
          topology.row_group(place.replica, place.stage, place.col)]
assert all(rank in group for group in groups) and len({group: len(group) for group in groups})
print(json.dumps([time.process_time() - began, (peak_memory() - memory) / 1e6, topology.size, len(actions)]))
"""


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_of_a_hundred_thousand_ranks(layout: str, device: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(RANKS), layout, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, megabytes, size, actions = json.loads(done.stdout)
    print(f"{layout} {device}: {seconds:.2f} s of CPU, {megabytes:.1f} MB")  # for `pytest -s`
    assert size == RANKS
    assert actions > 0
    assert seconds < SECONDS
    assert megabytes < MEGABYTES


@pytest.mark.parametrize("pipeline", [Gpipe(), OneFOneB(), ZeroBubble()])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_rank_has_the_lists_of_the_whole(pipeline: Spec, stages: int) -> None:
    network = Network([Linear(8) for _ in range(stages)], (6,))
    topology = Topology(3, tuple(Stage(i, i + 1, 2, 1) for i in range(stages)))
    options = Options(loss=CrossEntropy(), optimizer=Sgd(0.1), batch_size=48, micro_batches=4, pipeline=pipeline)
    plan = Plan(network, topology, options)
    lists = build(pipeline.kind, stages, 4, end=step_end(exact=plan.exact), paces=plan.paces)
    for stage, actions in enumerate(lists):
        assert StageSchedule(plan, stage).step(first=True, left=1, parts=False) == actions
