"""The search of hyperparameters: trials by groups of ranks, without a server."""
