"""The experts of a block divided among processes: each has some of them, and the tokens of all come to it.

So nobody launches for every expert, and none needs memory for all. Every process begins with the tokens of
its own share of a text, and ends with the answers to these.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from marlin_convert.models.experts import Experts

# Tokens that are answered at once: as each process has some of the experts only, more than a micro-batch.
TOKENS = {"cpu": 8192, "cuda": 32768}

# Sums that may be on their way while the next is computed: nobody waits for who has more to do in one.
AHEAD = 2


class Piece(Protocol):
    """One of as many pieces as there are processes, of whatever is counted."""

    def range(self, count: int) -> range:
        """Which of so many are in this piece."""


class Processes(Protocol):
    """What is asked of the processes that share a conversion."""

    @property
    def share(self) -> Piece:
        """This process's piece."""

    @property
    def shares(self) -> Sequence[Piece]:
        """Those of all, in their order."""

    def gathered(self, own: Tensor) -> tuple[Tensor, list[int]]:
        """The tensors (rows, ...) of all processes as one, in their order; how many rows each has."""

    def begin_sum(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        """Begin to sum a tensor up over all processes for its owner; what is returned waits for it."""


@dataclass(frozen=True)
class Called:
    """What the experts of a block are called with.

    x (tokens, k), index (tokens, choices) the experts that each token goes to, shares (tokens, choices) those
    that it takes of their answers. `of_each` says how many of the tokens each process has.
    """

    x: Tensor
    index: Tensor
    shares: Tensor
    of_each: Sequence[int] = ()


def rounds(processes: Processes, experts: int, at_once: int) -> list[range]:
    """The experts that this process has, some at a time, in as many rounds as the others take."""
    most = max(len(piece.range(experts)) for piece in processes.shares)
    own = processes.share.range(experts)
    return [own[start : start + at_once] for start in range(0, most, at_once)]


def gathered(processes: Processes, called: Called) -> Called:
    """What all processes call their experts with."""
    x, of_each = processes.gathered(called.x)
    index, shares = (processes.gathered(one)[0] for one in (called.index, called.shares))
    return Called(x, index, shares, of_each)


def answered(processes: Processes, experts: Experts, called: Called, dtype: torch.dtype) -> Tensor:
    """The sums (tokens, k) of what all experts answer to this process's tokens, of those that they get.

    Every process computes in `dtype` what its own experts answer to all tokens, and these parts are added up
    in float32.
    """
    answers: list[Tensor] = []
    begun: deque[tuple[Callable[[], None], Tensor | None]] = deque()

    def end() -> None:
        wait, part = begun.popleft()
        wait()
        if part is not None:
            answers.append(part.to(dtype))

    numbers, start = processes.share.range(experts.count), 0
    at_once = TOKENS[called.x.device.type]
    for owner, count in enumerate(called.of_each):
        for first in range(start, start + count, at_once):
            rows = slice(first, min(first + at_once, start + count))
            x = called.x[rows].to(dtype)
            part = experts.sum_of(numbers, x, called.index[rows], called.shares[rows])
            mine = processes.shares[owner] == processes.share
            begun.append((processes.begin_sum(part, owner), part if mine else None))
            if len(begun) > AHEAD:
                end()
        start += count
    while begun:
        end()
    return torch.cat(answers)
