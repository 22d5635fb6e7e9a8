"""Floor 1: the configuration. Only here pydantic and YAML are known."""
