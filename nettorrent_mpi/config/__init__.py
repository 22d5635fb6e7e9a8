"""Floor 1: the YAML file."""
