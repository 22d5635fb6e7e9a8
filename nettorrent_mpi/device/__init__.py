"""Floor 0: arrays, and what is computed with them."""
