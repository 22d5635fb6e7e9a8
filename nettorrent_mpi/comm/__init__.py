"""Floor 1: bytes between ranks. The only folder that imports mpi4py; it knows nothing of learning."""
