"""How close two models are on a text: perplexity, divergence, agreement; a block of each at a time."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates

# Of a walk over blocks, those left and their number: the blocks, one after another.
Progress = Callable[[range, int], Iterable[int]]

# Positions whose probabilities over the vocabulary are in memory at once.
POSITIONS = 256


@dataclass(frozen=True)
class Comparison:
    """A model against the one it was made from, over the predicted tokens of a text.

    `divergence` is KL(source || model) in nats a token, `agreement` the share of tokens where both find the
    same one likeliest; `margin` is the most, in nats, by which the source prefers its own where they do not;
    `hidden` is how far the hidden states are from the source's after every block.
    """

    tokens: int
    source_perplexity: float
    perplexity: float
    divergence: float
    agreement: float
    margin: float
    hidden: tuple[float, ...]


def compare(
    source: BlockModel,
    model: BlockModel,
    ids: Tensor,
    progress: Progress = lambda blocks, total: blocks,
) -> Comparison:
    """Run ids (samples, length) through two models of one architecture, block after block."""
    pair = []
    for one in (source, model):
        pair.append((one, HiddenStates(one, ids)))
        one.unload_outside()
    hidden = []
    for number in progress(range(len(model)), len(model)):
        for one, states in pair:
            states.advance(one.load(number), number)
            one.unload(number)
        hidden.append(pair[1][1].divergence(pair[0][1]))

    sums, margin = torch.zeros(4, dtype=torch.float64), 0.0
    for i, batch in enumerate(pair[0][1].batches):
        samples = zip(*(states.samples(i) for _, states in pair), strict=True)
        for sample, both in zip(batch.split(1), samples, strict=True):
            p, q = (one.logits(sample, state)[0, :-1] for (one, _), state in zip(pair, both, strict=True))
            found, most = _sums(p, q, sample[0, 1:].to(p.device))
            sums += found
            margin = max(margin, most)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    mean = sums / tokens
    perplexity = mean[:2].exp().tolist()
    return Comparison(
        tokens, perplexity[0], perplexity[1], mean[2].item(), mean[3].item(), margin, tuple(hidden)
    )


def joined(parts: Sequence[Comparison]) -> Comparison:
    """The comparison on a text, of those on its parts."""
    tokens = sum(part.tokens for part in parts)

    def mean(values: Iterable[float]) -> float:
        return sum(part.tokens * value for part, value in zip(parts, values, strict=True)) / tokens

    return Comparison(
        tokens,
        math.exp(mean(math.log(part.source_perplexity) for part in parts)),
        math.exp(mean(math.log(part.perplexity) for part in parts)),
        mean(part.divergence for part in parts),
        mean(part.agreement for part in parts),
        max(part.margin for part in parts),
        tuple(
            math.sqrt(mean(one**2 for one in after_block))
            for after_block in zip(*(part.hidden for part in parts), strict=True)
        ),
    )


def log_probabilities(model: BlockModel, ids: Tensor) -> Tensor:
    """Of every next token after ids (samples, length): (samples, length, vocabulary) float32 on the CPU."""
    hidden = HiddenStates(model, ids)
    model.unload_outside()
    for number in range(len(model)):
        hidden.advance(model.load(number), number)
        model.unload(number)
    rows = [
        model.logits(sample, state)[0]
        for i, batch in enumerate(hidden.batches)
        for sample, state in zip(batch.split(1), hidden.samples(i), strict=True)
    ]
    return torch.stack(rows).float().log_softmax(-1).cpu()


def _sums(source: Tensor, model: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Of logits (positions, vocabulary): (4,) float64 of both losses, divergence, agreements; the margin."""
    sums, margin = torch.zeros(4, dtype=torch.float64), 0.0
    for p, q, target in zip(
        source.split(POSITIONS), model.split(POSITIONS), targets.split(POSITIONS), strict=True
    ):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        sums += torch.stack(
            (
                -p.gather(1, target[:, None]).sum(dtype=torch.float64),
                -q.gather(1, target[:, None]).sum(dtype=torch.float64),
                kl_div(q, p, log_target=True, reduction="none").sum(dtype=torch.float64),
                (p.argmax(-1) == q.argmax(-1)).sum(dtype=torch.float64),
            )
        ).cpu()
        chosen = p.gather(1, q.argmax(-1, keepdim=True))[:, 0]
        margin = max(margin, (p.amax(-1) - chosen).max().item())
    return sums, margin
