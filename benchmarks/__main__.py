"""`python -m benchmarks [NAME] [options]`: what `make bench` runs. Without a name it is speed.

    speed      training speed against PyTorch, and of two ranks against one
    pairs      two ranks against what two cores can do at most
    inside     where the time of a step goes
    accuracy   the shipped configurations on real data
    reach      time to an accuracy on real data, two ranks against one
    start      time from starting mpirun to the first training step
    exchange   gossip, elite and the pipeline without flush against the exact exchange: accuracy, slow links, bubbles
    checkpoints   what a checkpoint costs the training beside which it is written
    reliability   trainings of which random ranks are killed
    torch_speed   nettorrent_mpi.torch against DistributedDataParallel on one machine
    torch_hosts   the same between hosts with slow links, and MNIST there
    zero_bubble   the pipelines 1f1b and zero_bubble on two ranks
    planner    predicted against measured seconds per step

`NAME --help` lists the options.
"""

import sys
from importlib import import_module

NAMES = (
    "speed",
    "pairs",
    "inside",
    "accuracy",
    "reach",
    "start",
    "exchange",
    "checkpoints",
    "reliability",
    "torch_speed",
    "torch_hosts",
    "planner",
    "zero_bubble",
)


def main() -> None:
    given = sys.argv[1:]
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    name = given.pop(0) if given and not given[0].startswith("-") else NAMES[0]
    if name not in NAMES:
        sys.exit(f"no benchmark {name!r}: there are {', '.join(NAMES)}")
    sys.argv = [f"benchmarks/{name}.py", *given]
    import_module(f"benchmarks.{name}").main()


main()
