"""Floor 1: arrays and their derivatives. No communication, no files."""
