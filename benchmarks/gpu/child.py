"""One part in a process of its own: `python -m benchmarks.gpu.child MODULE FUNCTION --lines FILE --seconds S [--host]`.

The exit code is 0 if all of its cases passed, 1 if one failed, 3 if all that there were are skipped.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.record import Record, Skipped

FAILED, SKIPPED = 1, 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child")
    parser.add_argument("module")
    parser.add_argument("function")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    record = Record(options.lines, options.host, options.seconds)
    if options.host:
        from tests.gpu.host.main import install

        install(0)
    try:
        getattr(import_module(options.module), options.function)(record)
    except Skipped as reason:
        with record.case(options.function):
            raise Skipped(str(reason)) from None
    if record.failed:
        return FAILED
    return SKIPPED if record.skipped and not record.passed else 0


if __name__ == "__main__":
    sys.exit(main())
