"""Floor 3: a topology and a network become wiring, state and steps."""
