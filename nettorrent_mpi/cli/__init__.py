"""Floor 4: the command line, and everything that a person sees of it."""
