"""Floor 5: the command line and its output."""
