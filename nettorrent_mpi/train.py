"""The entry point `mpirun -n P python -m nettorrent_mpi.train CONFIG`: the same as `nettorrent train CONFIG`."""

from __future__ import annotations

import sys

from nettorrent_mpi.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
