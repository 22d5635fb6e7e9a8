"""Floor 2: how replicas agree."""
