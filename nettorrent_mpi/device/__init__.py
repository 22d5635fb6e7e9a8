"""A device holds arrays and computes with them; nobody above this folder knows which library does it."""
