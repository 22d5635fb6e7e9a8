"""Floor 0: who owns what, who does what when, and what it costs. Pure Python: no NumPy, no MPI, no I/O."""
