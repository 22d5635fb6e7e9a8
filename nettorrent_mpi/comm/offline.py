"""Imported before anything else by programs that read configurations and plan, but are no rank: loading MPI then does
not start it. Started, it could keep an mpirun that such a program runs from working."""

from __future__ import annotations

import mpi4py

mpi4py.rc.initialize = mpi4py.rc.finalize = False
