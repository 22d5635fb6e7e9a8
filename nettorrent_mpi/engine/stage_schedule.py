"""A StageSchedule has the lists of actions of one stage of a plan, proved and built once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.plan.actions import Actions, Buffers, Kind, buffers_for, step_end
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.exchange_specs import Async
from nettorrent_mpi.plan.schedule import build, evaluation
from nettorrent_mpi.plan.stream import reach, staleness_bound, staleness_factor, stream_step
from nettorrent_mpi.plan.topology import Topology
from nettorrent_mpi.plan.zero_bubble import Paces


class StageSchedule:
    """A StageSchedule has one stage's lists of actions, proved together with those of all other stages. Raises
    ScheduleError if they would deadlock.

    `buffers` are the stage's, which hold some micro-batches between forward and backward. In a pipeline without
    flush (`asynchronous`) `late` is the largest number of updates between the weights that a forward pass uses and
    those that its gradient is applied to, and `ahead` the number of mini-batches that the first stage begins before the
    present one is complete.
    """

    def __init__(self, plan: Plan, stage: int):
        options, stages = plan.options, len(plan.topology.stages)
        self._pipeline, self._stages, self._stage = options.pipeline.kind, stages, stage
        self._micro_batches, self._clip, self._exact = options.micro_batches, options.clip_norm is not None, plan.exact
        launched, end = options.device == "gpu", self._end(parts=False)
        self._paces = plan.paces
        have = _proved(plan.topology, self._pipeline, self._micro_batches, end, self._paces, launched)
        self.buffers, self._slots = have[stage], tuple(each.slots for each in have)
        self.asynchronous = isinstance(options.pipeline, Async) and stages > 1
        self.late = self.ahead = 0
        self.rate_scale = 1.0
        if self.asynchronous:
            self.late = staleness_bound(stages, self._micro_batches, stage)
            self.ahead = staleness_bound(stages, self._micro_batches, 0)
        if isinstance(options.pipeline, Async) and options.pipeline.staleness_aware and self.asynchronous:
            self.rate_scale = staleness_factor(stages, self._micro_batches, stage)
        self._reach = reach(stages, self._micro_batches)

    def _end(self, *, parts: bool) -> tuple[Kind, ...]:
        return step_end(clip=self._clip, exact=self._exact, parts=parts)

    def may_follow(self, before: int, left: int) -> bool:
        """Whether a step may be given `left` steps until rest after the one before was given `before`."""
        return before in (0, left) or (left > self.ahead and before >= self._reach)

    def step(self, *, first: bool, left: int, parts: bool) -> Actions:
        """Return the actions of a training step.

        `first`: the pipeline was empty before; `left`: steps until it is empty again, this one included; `parts`: this
        rank computes weight gradients in parts.
        """
        end = self._end(parts=parts)
        if self.asynchronous:
            return _stream(self._stages, self._micro_batches, self._stage, first, min(left, self._reach + 1), end)
        return _flushed(self._pipeline, self._stages, self._micro_batches, self._stage, end, self._paces)

    def evaluation(self, micro_batches: int) -> Actions:
        """Return the actions of an evaluation with this many micro-batches."""
        return evaluation(self._slots, micro_batches)[self._stage]


@lru_cache(maxsize=64)
def _proved(
    topology: Topology, pipeline: str, micro_batches: int, end: Sequence[Kind], paces: Paces, launched: bool
) -> tuple[Buffers, ...]:
    """Prove the lists of all stages, and, where GPUs run them, the order of their launches, in training and in an
    evaluation; gives the buffers of each stage."""
    lists = build(pipeline, len(topology.stages), micro_batches, end=end, paces=paces)
    check(topology, lists)
    have = tuple(buffers_for(stage, actions) for stage, actions in enumerate(lists))
    if launched:
        from nettorrent_mpi.plan.launches import proved  # nothing that a run on CPU cores needs

        proved(topology, lists, have)
        proved(topology, evaluation([each.slots for each in have], micro_batches), have)
    return have


@lru_cache(maxsize=64)
def _stream(stages: int, micro_batches: int, stage: int, first: bool, left: int, end: Sequence[Kind]) -> Actions:
    return stream_step(stages, micro_batches, stage, first=first, left=left, end=end)


@lru_cache(maxsize=64)
def _flushed(pipeline: str, stages: int, micro_batches: int, stage: int, end: Sequence[Kind], paces: Paces) -> Actions:
    return build(pipeline, stages, micro_batches, end=end, paces=paces)[stage]
