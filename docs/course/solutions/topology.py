"""Exercise 3: how many rounds of gossip bring replicas together, on different graphs."""

from nettorrent_mpi.plan.mixing import mixed, rounds_to_consensus, spectral_gap
from nettorrent_mpi.plan.pairing import make_pairing

print("replicas        ring  exponential  hypercube  complete   (rounds until differences are 1/1000)")
for replicas in (4, 8, 16, 32):
    pairings = [make_pairing(kind, replicas, seed=1) for kind in ("ring", "exponential", "hypercube", "complete")]
    rounds = [rounds_to_consensus(pairing, to=1e-3) for pairing in pairings]
    print(f"{replicas:8}  " + "".join(f"{each!s:>11}" for each in rounds))
    assert rounds[3] == 1
    assert rounds[0] > rounds[1]

# On a ring the spectral gap falls with the square of the length, and rounds grow with it.
gaps = [spectral_gap(make_pairing("ring", replicas, seed=1)) for replicas in (8, 16, 32)]
print("spectral gap of a ring of 8, 16 and 32:", ", ".join(f"{gap:.4f}" for gap in gaps))
assert 3 < gaps[0] / gaps[1] < 4.5
assert 3 < gaps[1] / gaps[2] < 4.5

# A power of two on the exponential graph: log2(n) rounds of pairs at distances 1, 2, 4, ... give the exact average.
pairing = make_pairing("exponential", 8, seed=1)
values = [8.0, 0, 0, 0, 0, 0, 0, 0]
for number in range(3):
    values = mixed(pairing, number, values)
    print(f"after round {number + 1}:", values)
assert values == [1.0] * 8
