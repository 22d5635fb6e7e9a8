"""Exercise 1: the part of a pipeline's time in which a stage waits, by formula and by simulation."""

from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.timeline import simulate

print("stages  pieces    1f1b   gpipe  (P - 1) / (M + P - 1)")
for stages in (2, 4, 8):
    for pieces in (1, 4, 16):
        formula = (stages - 1) / (pieces + stages - 1)
        found = {}
        for pipeline in ("1f1b", "gpipe"):
            lists = build(pipeline, stages, pieces)
            found[pipeline] = simulate(lists, forward=1.0, backward=2.0, transfer=0.0).bubble
            assert abs(found[pipeline] - formula) < 1e-9
        print(f"{stages:6}  {pieces:6}  {found['1f1b']:6.1%}  {found['gpipe']:6.1%}  {formula:6.1%}")

# Backward passes in two halves: of three units of waiting for each stage but one, one is left.
for stages, pieces in ((2, 4), (4, 4), (4, 16), (8, 16)):
    lists = build("zero_bubble", stages, pieces)
    split = simulate(lists, forward=1.0, backward=2.0, transfer=0.0, weights=1.0).bubble
    assert abs(split - (stages - 1) / (3 * pieces + stages - 1)) < 1e-9
    print(f"{stages:6}  {pieces:6}  zero_bubble {split:.1%}")

# A stage that takes twice as long holds up all others: more pieces do not help.
lists = build("1f1b", 4, 16)
even = simulate(lists, forward=1.0, backward=2.0, transfer=0.0)
uneven = simulate(lists, forward=[1.0, 2.0, 1.0, 1.0], backward=[2.0, 4.0, 2.0, 2.0], transfer=0.0)
print(f"4 stages, 16 pieces: bubble {even.bubble:.1%}; with one stage twice as slow {uneven.bubble:.1%}")
assert uneven.makespan > 1.6 * even.makespan
