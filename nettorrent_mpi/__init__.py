"""Trains neural networks over MPI with one swarm of ranks per layer.

This module stays light: importing it loads neither NumPy nor MPI, so that `nettorrent_mpi.env` can set their
environment first.
"""

__version__ = "0.1.0"
