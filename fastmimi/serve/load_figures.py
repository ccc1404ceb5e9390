"""The arithmetic of a load test: how long frames took, whether playback ran dry, how many clients a server bears."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable

import numpy as np

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


class Frames:
    """When each frame of a stream had been sent, and the seconds until its codes and its audio came.

    Frame k has been sent once sample (k + 1) * frame_size - 1 has.
    """

    def __init__(self, frame_size: int):
        self.frame_size = frame_size
        self.codes, self.audio = array("d"), array("d")  # seconds, by frame
        self._sent = array("d")  # times, by frame
        self._samples_sent = self._samples_heard = 0

    @property
    def count(self) -> int:
        """Whole frames that were sent."""
        return len(self._sent)

    def sent(self, samples: int, now: float) -> None:
        """So many samples more are sent now."""
        self._samples_sent += samples
        self._sent.extend([now] * (self._samples_sent // self.frame_size - len(self._sent)))

    def codes_came(self, frames: int, now: float) -> None:
        self._came(self.codes, frames, now)

    def audio_came(self, samples: int, now: float) -> None:
        self._samples_heard += samples
        self._came(self.audio, self._samples_heard // self.frame_size - len(self.audio), now)

    def _came(self, seconds: array[float], frames: int, now: float) -> None:
        first = len(seconds)
        if first + frames > len(self._sent):
            raise ValueError(f"{first + frames} frames came back, and {len(self._sent)} were sent")
        seconds.extend([now - sent for sent in self._sent[first : first + frames]])


class Playback:
    """Plays what it receives in real time, beginning `buffer_s` after the first of it.

    Where that runs dry there is an underrun: playback halts, and goes on when more comes.
    """

    def __init__(self, rate: int, buffer_s: float):
        self.rate, self.buffer_s = rate, buffer_s
        self.underruns, self.halted_s = 0, 0.0
        self._until: float | None = None  # when all that was received will have been played

    def received(self, samples: int, now: float) -> None:
        if self._until is None:
            self._until = now + self.buffer_s
        elif now > self._until:
            self.underruns += 1
            self.halted_s += now - self._until
            self._until = now
        self._until += samples / self.rate


def quantiles_ms(seconds: array[float]) -> dict[str, float | None]:
    """p50, p95, p99 and max in ms, each a value that occurred; None where there is nothing."""
    if not seconds:
        return dict.fromkeys(QUANTILES)
    found = np.quantile(np.asarray(seconds), list(QUANTILES.values()), method="inverted_cdf")
    return {name: round(1e3 * float(value), 3) for name, value in zip(QUANTILES, found, strict=True)}


async def most_clients(passes: Callable[[int], Awaitable[bool]], most: int) -> int:
    """The largest number up to `most` that passes, 0 if 1 does not; it is doubled until one fails, then bisected."""
    good, bad = 0, most + 1
    while good + 1 < bad:
        number = (good + bad) // 2 if bad <= most else min(2 * good or 1, most)
        if await passes(number):
            good = number
        else:
            bad = number
    return good
