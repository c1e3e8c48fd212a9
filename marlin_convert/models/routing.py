"""Which tokens calibrate which expert: those that go to it and, where these are few, some others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# An expert that fewer tokens go to than it has inputs sees others too, evenly spaced over the text, until
# there are as many; they count so much less.
WEIGHT = 0.25

# Rows of inputs that are summed up at once: a GPU waits for every piece of them.
ROWS = {"cpu": 8192, "cuda": 32768}


@dataclass(frozen=True)
class Entering:
    """What enters the experts of a block with all of a text.

    x (tokens, k); `routed` has of every expert the tokens that go to it, numbers of rows of x. Where x is a
    piece of a longer text, so many tokens come `before` it, and `of_all` says how many the text has, and how
    many of them go to each expert.
    """

    x: Tensor
    routed: list[Tensor]
    before: int = 0
    of_all: tuple[int, ...] = ()

    def counts(self, number: int) -> tuple[int, int]:
        """How many tokens the whole text has, and how many of them go to an expert."""
        if not self.of_all:
            return len(self.x), len(self.routed[number])
        return self.of_all[0], self.of_all[1 + number]


@dataclass(frozen=True)
class Chosen:
    """Tokens (count,) that calibrate an expert, numbers of rows; whether they are its `own` or others."""

    tokens: Tensor
    own: bool

    @property
    def weight(self) -> float:
        """What the rows are multiplied by, so that their squares count as much as they should."""
        return 1.0 if self.own else WEIGHT**0.5


def chosen(entering: Entering, number: int) -> Iterator[Chosen]:
    """The tokens that calibrate an expert, in pieces of ROWS at most; those that go to it come first."""
    own = entering.routed[number]
    rows = ROWS[own.device.type]
    here, inputs = entering.x.shape
    every, routed = entering.counts(number)
    if len(own):
        yield from (Chosen(piece, own=True) for piece in own.split(rows))
    if routed < inputs:
        count = min(inputs - routed, every)
        evenly_spaced = torch.arange(count, device=own.device) * every // count - entering.before
        if here < every:
            evenly_spaced = evenly_spaced[(evenly_spaced >= 0) & (evenly_spaced < here)]
        yield from (Chosen(piece, own=False) for piece in evenly_spaced.split(rows) if len(piece))
