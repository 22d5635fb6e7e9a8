"""A device holds arrays and computes with them; no code above this folder depends on which library does it."""
