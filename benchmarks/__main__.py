"""`python -m benchmarks`: what `make bench` runs."""

from benchmarks.speed import main

main()
