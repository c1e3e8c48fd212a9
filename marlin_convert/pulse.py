"""Whether the other processes of one conversion are still there, for those that wait for them.

One that ends is noticed at once, for its connections end too. Of one that is stopped, or whose machine is
lost, nothing is heard any more, and that is all there is to be noticed. While all are stopped, as a container
may be, none counts as silent: signs are counted, not seconds.
"""

import threading
import time
from typing import Any

# Seconds between two signs of life, and without one until somebody counts as lost.
BEAT = 4.0
SILENCE = 40.0


class Pulse:
    """Signs of life, given and looked for in a thread of their own, by a `store` that all ranks share.

    It stands on the machine of the first rank.
    """

    def __init__(self, store: Any, rank: int, count: int):
        """Begin; `store` is used by nobody else."""
        self._store = store
        self._rank = rank
        self._missed = dict.fromkeys(set(range(count)) - {rank}, 0)  # own beats without a sign of them
        self._answered = self._looked = self._awake = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        others = sorted(self._missed)
        before = dict.fromkeys(others, b"")
        beat = 0
        try:
            while not self._ended.wait(BEAT if beat else 0):
                beat += 1
                self._store.set(f"pulse {self._rank}", str(beat))
                beats = self._store.multi_get([f"pulse {rank}" for rank in others])
                self._answered = time.monotonic()
                for rank, sign in zip(others, beats, strict=True):
                    self._missed[rank] = self._missed[rank] + 1 if sign == before[rank] else 0
                    before[rank] = sign
        except RuntimeError:  # the machine of the first rank, or that rank, has gone: silence from now on
            pass

    @property
    def silent(self) -> list[int]:
        """The ranks that have not been heard of for too long."""
        return [rank for rank, missed in self._missed.items() if missed * BEAT > SILENCE]

    @property
    def unanswered(self) -> bool:
        """Whether the store does not answer any more, as far as this process was there to see it."""
        now = time.monotonic()
        if now - self._looked > 2 * BEAT:
            self._awake = now
        self._looked = now
        return now - max(self._answered, self._awake) > SILENCE

    def end(self) -> None:
        """Give no more signs."""
        self._ended.set()
        self._thread.join()
