"""Exercise 5: from which link on is gossip faster than the exact exchange?"""

WEIGHTS = 2_910_000  # of 784-1024x3-10 in configs/mnist_wide.yaml
COMPUTE = 0.05  # seconds of a step on one core
HOSTS = 4


def exact(rate: float) -> float:
    """Seconds of a step: an all-reduce sends 2 (n - 1) / n times the gradients; one half hides behind the backward."""
    sent = 2 * (HOSTS - 1) / HOSTS * 4 * WEIGHTS
    return COMPUTE + max(sent / rate - COMPUTE / 2, 0)


def gossip(rate: float, part: float) -> float:
    """Seconds of a step: a part of the weights travels while the whole next step computes."""
    return max(COMPUTE, part * 4 * WEIGHTS / rate)


print("link, Mbit/s   exact   gossip, everything   gossip, the part that fits")
for megabits in (50, 200, 1_000, 10_000, 100_000):
    rate = megabits * 1e6 / 8
    part = min(1.0, COMPUTE * rate / (4 * WEIGHTS))  # what `part: auto` measures for
    times = exact(rate), gossip(rate, 1.0), gossip(rate, part)
    print(
        f"{megabits:12,}  " + "  ".join(f"{each:8.3f} s" for each in times) + f"   ({part:.0%} of the weights a round)"
    )
    assert times[2] <= times[1]
    assert times[2] <= times[0] + 1e-12
ratio = exact(25e6) / gossip(25e6, COMPUTE * 25e6 / (4 * WEIGHTS))
print(f"At 200 Mbit/s gossip makes {ratio:.1f} steps while the exact exchange makes one.")
assert ratio > 10
