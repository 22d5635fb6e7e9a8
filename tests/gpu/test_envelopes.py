"""Envelopes over the host device: what operations wrote reaches the host, what came reaches operations, in any order of
the streams; and what they would forget shows."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.device.gpu.envelopes import Envelopes, GpuEnvelope
from nettorrent_mpi.device.gpu.runtime import Event, Stream
from tests.gpu.host.runtime import HostRuntime

HEAD, SIZE, MESSAGES, SEEDS = 64, 24, 12, 40


class Post:
    """Post sends messages to itself over the host, up to three at a time, through six envelopes, and keeps what
    operations read. An operation is a copy on the compute stream."""

    def __init__(self, seed: int):
        self.device = Gpu(HostRuntime(seed, memory=1 << 24))
        self.dice = random.Random(seed)
        runtime = self.device.runtime
        self.texts = [np.full(SIZE, n + 1, np.uint8) for n in range(MESSAGES)]
        self.source = [runtime.pinned(SIZE) for _ in self.texts]
        self.found = [runtime.pinned(SIZE) for _ in self.texts]
        for text, source in zip(self.texts, self.source, strict=True):
            source[...] = text

    def operation(self, out: Array, x: Array) -> None:
        self.device.runtime.copy(self.device.stream, out, x)

    def done(self, envelope: GpuEnvelope) -> bool:
        return envelope.done()

    def run(self, *, aside: bool = False) -> None:
        free = deque(self.device.envelope(HEAD, SIZE) for _ in range(6))
        sent: deque[tuple[int, int, GpuEnvelope]] = deque()
        returning: list[GpuEnvelope] = []
        number = 0
        while number < MESSAGES or sent:
            if number < MESSAGES and len(sent) < 3 and free:
                size = SIZE - number % 3
                envelope = free.popleft()
                self.operation(envelope.body[:size], self.source[number][:size])
                envelope.collect(size)
                envelope.drop()
                sent.append((number, size, envelope))
                number += 1
            if sent and free and self.done(sent[0][2]):
                this, size, envelope = sent.popleft()
                into = free.popleft()
                into.whole[...] = envelope.whole
                free.append(envelope)
                into.deliver(size)
                reader = into.aside(size) if aside and self.dice.random() < 0.5 else into
                if this % 4 != 3:  # one that nobody reads
                    self.operation(self.found[this][:size], reader.body[:size])
                reader.drop()
                returning.append(into)
            free += [envelope for envelope in returning if self.done(envelope)]
            returning = [envelope for envelope in returning if envelope not in free]
        self.device.synchronize()

    def right(self) -> bool:
        pairs = [
            (f, t, SIZE - n % 3) for n, (f, t) in enumerate(zip(self.found, self.texts, strict=True)) if n % 4 != 3
        ]
        return all(np.array_equal(found[:size], text[:size]) for found, text, size in pairs)


@pytest.mark.parametrize("aside", [False, True])
def test_messages_arrive_in_any_order_of_the_streams(aside: bool) -> None:
    for seed in range(SEEDS):
        post = Post(seed)
        post.run(aside=aside)
        assert post.right(), seed
        bodies = (post.device.arena.used) // 256
        assert bodies <= 9, "messages share bodies"


FAULTS = ("the copy to the host", "the arrival", "the last use of a body", "the host's own use")


def planted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "the copy to the host":

        def collect(self: Envelopes, to: Array, body: Array) -> Event:
            return self._copy(self._down, to, body)

        monkeypatch.setattr(Envelopes, "collect", collect)
    elif fault == "the arrival":
        deliver = GpuEnvelope.deliver

        def without(self: GpuEnvelope, size: int) -> None:
            deliver(self, size)
            self._arriving = False

        monkeypatch.setattr(GpuEnvelope, "deliver", without)
    elif fault == "the last use of a body":
        take = Envelopes.take

        def at_once(self: Envelopes, size: int, stream: Stream) -> Array:
            self._spare = {key: [spare._replace(free=[]) for spare in value] for key, value in self._spare.items()}
            return take(self, size, stream)

        monkeypatch.setattr(Envelopes, "take", at_once)
    else:
        monkeypatch.setattr(Post, "done", lambda self, envelope: True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wait_left_out_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(fault, monkeypatch)
    wrong = 0
    for seed in range(SEEDS):
        post = Post(seed)
        post.run()
        wrong += not post.right()
    assert wrong > SEEDS // 2, f"{wrong} of {SEEDS} orders"


def test_a_cpus_envelope_is_one_memory() -> None:
    envelope = make_device("cpu", "numpy").envelope(HEAD, SIZE)
    assert (envelope.whole.size, envelope.body.size) == (HEAD + SIZE, SIZE)
    assert np.shares_memory(envelope.whole, envelope.body)
    assert envelope.whole.ctypes.data % 64 == 0
    envelope.whole[...] = range(HEAD + SIZE)
    envelope.collect(5)
    assert envelope.done()
    other = envelope.aside(5)
    np.testing.assert_array_equal(other.whole, envelope.whole[: HEAD + 5])
    envelope.whole[...] = 0
    np.testing.assert_array_equal(other.body, range(HEAD, HEAD + 5))
