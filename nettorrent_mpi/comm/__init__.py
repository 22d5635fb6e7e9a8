"""Floor 1: bytes between ranks. The only place that imports mpi4py; knows nothing of learning."""
