"""`make bench-gpu`: everything that only a GPU can show, in less than eight minutes.

    python -m benchmarks.gpu [--only PART ...] [--output FOLDER] [--host] [--scale 1.0]

runs the parts below in this order, each in processes of its own and with a limit of time; what a part leaves of its
time is the later ones'. After each part it writes benchmarks/results/gpu_NAME.json, NAME being the GPU's. A part that
fails is recorded with its traceback, one whose tool is missing or refuses as skipped, and the rest runs. The exit code
is 1 if a part failed.

"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runner import RESULTS, Runner

__doc__ += "\n".join(f"    {part.name:12} {part.limit:4.0f} s  {part.shows}" for part in PARTS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help="these parts, after `machine`"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the JSON file")
    parser.add_argument("--scale", type=float, default=1.0, help="of all limits of time")
    parser.add_argument(
        "--host", action="store_true", help="on the host device of tests/gpu, which needs no GPU: the parts that can"
    )
    options = parser.parse_args(arguments)
    if not options.scale > 0:
        parser.error("--scale has to be above 0")
    runner = Runner(
        [part for part in PARTS if part.name in {"machine", *options.only}], options.output, options.host, options.scale
    )
    return runner.run()


if __name__ == "__main__":
    sys.exit(main())
