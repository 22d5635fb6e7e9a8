"""Looks for faults by many cases, and keeps one case of each kind.

python -m tests.fuzz hdf5 --cases 10000 --first 0 --keep /tmp/found
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.fuzz.cases import CASES
from tests.fuzz.sandbox import Case, Sandbox


def _kind(text: str) -> str:
    """Return what cases of one kind have in common: the place of an exception, or a message without numbers."""
    places = re.findall(r'File ".*?/([\w/]+\.py)", line (\d+)', text)
    last = text.strip().split("\n")[-1]
    return " ".join([*(f"{name}:{line}" for name, line in places[-2:]), re.sub(r"[\d'\"].*", "", last)[:80]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=CASES)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, which is its seed")
    parser.add_argument("--keep", type=Path, default=None)
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[tuple[str, str]] = collections.Counter()
    with (
        contextlib.suppress(KeyboardInterrupt),  # an interrupted one tells what it has found
        tempfile.TemporaryDirectory(dir="/dev/shm") as made,
        Sandbox(Path(made)) as sandbox,
    ):
        numbers = range(args.first, args.first + args.cases)
        for case, outcome in sandbox.run(Case(args.target, number) for number in numbers):
            counts[outcome.kind] += 1
            kind = (outcome.kind, _kind(outcome.text.replace(made, "")))
            kinds[kind] += 1
            if not (done := sum(counts.values())) % 1000:
                print(f"{args.target}: {done:,} cases", file=sys.stderr, flush=True)
            if outcome.fault and kinds[kind] == 1:
                print(f"{outcome.kind}: case {case.number}: {outcome.text}\n", flush=True)
                if args.keep is not None:
                    shutil.copytree(Path(made, "kept", case.name), args.keep / case.name)
    for (kind, what), count in sorted(kinds.items()):
        print(f"{count:7} {kind:8} {what}")
    print(f"{args.target} from {args.first}: {sum(counts.values()):,} cases, {dict(counts)}")


if __name__ == "__main__":
    main()
