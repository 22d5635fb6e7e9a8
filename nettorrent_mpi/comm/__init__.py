"""Floor 1 moves bytes between ranks. It is the only folder that imports mpi4py, and knows nothing of learning."""
