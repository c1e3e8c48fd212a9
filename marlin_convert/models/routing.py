"""Which tokens calibrate which expert: those that go to it and, where these are few, some others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# An expert that fewer tokens go to than it has inputs sees others too, evenly spaced over the text, until
# there are as many; they count so much less.
WEIGHT = 0.25

# Rows of inputs that are summed up at once.
ROWS = 8192


@dataclass(frozen=True)
class Entering:
    """What enters the experts of a block with a micro-batch.

    x (tokens, k); `routed` has of every expert the tokens that go to it, and as which of their choices;
    shares (tokens, choices) are the experts' in a token.
    """

    x: Tensor
    routed: list[tuple[Tensor, Tensor]]
    shares: Tensor


@dataclass(frozen=True)
class Chosen:
    """Tokens of one micro-batch, (count,), for an expert; as which of their `choices`, or None for others."""

    batch: int
    tokens: Tensor
    choices: Tensor | None


def chosen(entering: list[Entering], number: int, least: int) -> Iterator[list[Chosen]]:
    """The tokens that calibrate an expert, in pieces of about ROWS; those that go to it come first."""
    piece: list[Chosen] = []
    rows = total = 0
    for batch, one in enumerate(entering):
        tokens, choices = one.routed[number]
        if len(tokens):
            piece.append(Chosen(batch, tokens, choices))
            rows += len(tokens)
            total += len(tokens)
        if rows >= ROWS:
            yield piece
            piece, rows = [], 0
    if piece:
        yield piece
    if total < least:
        yield _others(entering, least - total)


def _others(entering: list[Entering], count: int) -> list[Chosen]:
    """So many tokens, evenly spaced over the text; all, if there are no more."""
    sizes = torch.tensor([len(one.x) for one in entering])
    every = int(sizes.sum())
    places = torch.arange(min(count, every)) * every // min(count, every)
    ends = sizes.cumsum(0)
    batches = torch.searchsorted(ends, places, right=True)
    found = []
    for batch, one in enumerate(entering):
        mine = places[batches == batch] - (ends[batch] - sizes[batch])
        if len(mine):
            found.append(Chosen(batch, mine.to(one.x.device), None))
    return found


def gathered(entering: list[Entering], piece: list[Chosen]) -> Tensor:
    """The inputs of a piece, (rows, k)."""
    return torch.cat([entering[one.batch].x[one.tokens] for one in piece])


def weight(piece: list[Chosen]) -> float:
    """What the rows of a piece are multiplied by, so that their squares count as much as they should."""
    return 1.0 if piece[0].choices is not None else WEIGHT**0.5
