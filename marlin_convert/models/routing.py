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

    x (tokens, k); `routed` has of every expert the tokens that go to it, numbers of rows of x.
    """

    x: Tensor
    routed: list[Tensor]


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
    tokens, inputs = entering.x.shape
    if len(own):
        yield from (Chosen(piece, own=True) for piece in own.split(rows))
    if len(own) < inputs:
        count = min(inputs - len(own), tokens)
        evenly_spaced = torch.arange(count, device=own.device) * tokens // count
        yield from (Chosen(piece, own=False) for piece in evenly_spaced.split(rows))
