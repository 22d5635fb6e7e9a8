"""The pipeline that never flushes: 1F1B over mini-batches that follow each other without a gap.

PipeDream (Narayanan et al. 2019, SOSP, section 3.3): every backward pass uses the weights that its forward pass used,
which the stage keeps until then. Here a mini-batch has M micro-batches and one update, as in PipeDream-2BW (Narayanan
et al. 2021, arXiv 2006.09503), and two versions of the weights suffice wherever a stage has at most M + 1 micro-batches
in flight; unlike there, a forward pass always uses the newest weights, so that gradients are no later than they must
be.

Stage s of S has d = S - s micro-batches in flight, so that the stages behind it are never without work: in every step
its forward passes are d - 1 micro-batches ahead of its backward passes. F(m + d - 1) of step n uses the weights after n
updates, and floor((m + d - 1) / M) more are made before its gradient's own. All steps are alike but the first after a
drain, which fills the pipeline, and the last ones before a drain, which have no forward passes left. What they have
left out is done after the drain, with the weights that it would have used without one (`age`): so a drain costs time,
and changes no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nettorrent_mpi.plan.actions import ONCE, Action, Actions, Kind, complete, step_end


def stream_step(
    stages: int,
    micro_batches: int,
    stage: int,
    *,
    first: bool,
    left: int,
    transfers: bool = True,
    end: Sequence[Kind] = step_end(),
) -> Actions:
    """Return the actions of `stage` in one step: [F0 .. F(d-2) if `first`], then F(m+d-1), B(m) for every m, and the
    step's `end`; with `transfers` also all sends, receives and waits around them.

    Micro-batches are numbered from the step's own mini-batch on: m >= micro_batches is one of a later mini-batch.
    `first` is for the first step after a drain; `left` >= 1 is the number of mini-batches until the next drain, this
    one included: forward passes beyond them are left out. For every `left` greater than `reach(stages, micro_batches)`
    the list is the same. N makes all stages wait for each other.
    """
    assert 0 <= stage < stages
    assert micro_batches >= 1
    assert left >= 1
    ahead, until = stages - stage - 1, micro_batches * left
    compute = [Action(stage, "F", m) for m in range(min(ahead, until))] if first else []
    for m in range(micro_batches):
        if m + ahead < until:
            compute.append(Action(stage, "F", m + ahead))
        compute.append(Action(stage, "B", m))
    if transfers:
        return complete(compute, stage, stages, stages - stage, until, first=first, end=end)
    return compute + [Action(stage, kind) for kind in end]


def stream(
    stages: int, micro_batches: int, steps: int, *, transfers: bool = True, end: Sequence[Kind] = step_end()
) -> list[Actions]:
    """Return the lists of all stages for `steps` mini-batches from one drain to the next: the steps of `stream_step`,
    with micro-batches numbered on over the mini-batches, and once-per-step actions numbered by mini-batch."""
    lists: list[Actions] = []
    for s in range(stages):
        lists.append([])
        for n in range(steps):
            step = stream_step(stages, micro_batches, s, first=n == 0, left=steps - n, transfers=transfers, end=end)
            lists[s] += counted_on(step, micro_batches, n)
    return lists


def counted_on(actions: Iterable[Action], micro_batches: int, step: int) -> Actions:
    """Renumber the actions of one step for a list of several, in which it is number `step` (from 0 on)."""
    return [Action(s, kind, step if m is None else m + step * micro_batches) for s, kind, m in actions]


def window(stages: int, micro_batches: int) -> list[Actions]:
    """Return the compute of each stage in the shortest stream in which every stage reaches its largest number of
    micro-batches in flight and its latest gradients. It ends with a drain."""
    lists = stream(stages, micro_batches, window_steps(stages, micro_batches), transfers=False)
    return [[action for action in actions if action.kind not in ONCE] for actions in lists]


def window_steps(stages: int, micro_batches: int) -> int:
    """Return the number of mini-batches of a `window`."""
    return staleness_bound(stages, micro_batches, 0) + 1


def staleness_bound(stages: int, micro_batches: int, stage: int) -> int:
    """Return the largest number of updates between the weights that a micro-batch's forward pass uses and those that
    its gradient is applied to: ceil((d - 1) / M). The last stage is never late."""
    return -(-(stages - stage - 1) // micro_batches)


def reach(stages: int, micro_batches: int) -> int:
    """Return how many mini-batches after the present one receives may be posted for: ceil(S / M). That is at most one
    more than the mini-batches that are begun, which are `staleness_bound` of the first stage."""
    return -(-stages // micro_batches)


def age(stages: int, micro_batches: int, stage: int, m: int) -> int:
    """Return how many updates old are the weights that F(m) uses in the first step after a drain: those of the step in
    which it would have run without the drain, floor((m - d + 1) / M) steps from this one."""
    return max(0, -((m - (stages - stage - 1)) // micro_batches))


def mean_staleness(stages: int, micro_batches: int, stage: int) -> float:
    """Return the mean of these updates over the micro-batches of a mini-batch, once the pipeline is full: (d - 1) /
    M."""
    return (stages - stage - 1) / micro_batches


def staleness_factor(stages: int, micro_batches: int, stage: int) -> float:
    """Return the factor on a stage's learning rate that is aware of staleness; that of the last stage is 1."""
    return 1 / (1 + mean_staleness(stages, micro_batches, stage))


def versions(stages: int, micro_batches: int, stage: int) -> int:
    """Return the largest number of versions of its weights that a stage holds: the newest, and those still needed by
    its micro-batches in flight."""
    return staleness_bound(stages, micro_batches, stage) + 1
