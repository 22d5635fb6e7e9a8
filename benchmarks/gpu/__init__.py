"""These parts find out what only a GPU can show: whether its numbers are right, and how fast it is. `make bench-gpu`
runs all of them."""
