"""Floor 3 makes wiring, state and steps of a topology and a network."""
