"""The experts of a mixture as linears of their own, whatever transformers stacks them into.

transformers keeps the experts of a layer in stacked weights (E, n, k) and hands them tokens, which experts
each of them goes to, and the shares of their answers. One function does that for every kind of model that
uses its experts interface (https://huggingface.co/docs/transformers/experts_interface): here every expert has
a linear for each of its weights, so that what is true of linears is true of experts.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import _default_apply_gate

from marlin_convert.checkpoint.linears import Stacked
from marlin_convert.errors import SourceError

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"

# What the interface hands to a module of experts.
HANDED = ("hidden_states", "top_k_index", "top_k_weights")

# Bytes of weights of one role that are multiplied as one, and of inputs that are picked out for it: they are
# copied beside each other.
GROUPED = 1 << 28


class Experts(nn.Module):
    """What take_apart makes of a module of experts: its children "0", "1", ... have a linear for each weight.

    It goes on being what it was, with its own activation, gate and norm.
    """

    count: int
    roles: tuple[str, ...]  # the names of gate, up and down, or of up and down
    stacks: tuple[Stacked, ...]
    # what the module has from transformers
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool = False  # older versions have none
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the experts' answers to hidden_states (tokens, k), each times its share of the token.

        top_k_index (tokens, choices) says which experts those are, top_k_weights (tokens, choices) how large
        the shares.
        """
        if isinstance(hidden_states, FakeTensor):  # nobody knows who goes where; all experts are of one shape
            return torch.zeros_like(hidden_states) + self.answer(0, hidden_states)
        total = self.sum_of(range(self.count), hidden_states, top_k_index, top_k_weights)
        return total.to(hidden_states.dtype)

    def sum_of(
        self, numbers: range, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What experts of these numbers have in that sum, (tokens, k) float32."""
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        if not numbers:
            return total
        if self._can_group(hidden_states.device, hidden_states.dtype):
            return self.in_groups(numbers, hidden_states, top_k_index, top_k_weights)
        every = routed(top_k_index, self.count)
        for number in numbers:
            tokens, choices = every[number]
            if len(tokens):
                answer = self.answer(number, hidden_states[tokens])
                shares = top_k_weights[tokens, choices]
                total.index_add_(0, tokens, (answer * shares[:, None]).float())
        return total

    def in_groups(
        self, numbers: range, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What `sum_of` gives, with the products of many experts as one, which a GPU need not wait for."""
        tokens, choices = top_k_index.shape
        places, ends = _by_expert(top_k_index, self.count)
        shares = top_k_weights.T.flatten()
        answers = hidden_states.new_zeros(choices * tokens, hidden_states.shape[1])
        at_once = self._at_once(numbers.start)
        stops = ends.tolist()
        for first in numbers[::at_once]:
            last = min(first + at_once, numbers.stop) - 1
            start = stops[first - 1] if first else 0
            here = places[start : stops[last]]
            if len(here):
                answer = self._answers(first, ends[first : last + 1] - start, hidden_states[here % tokens])
                answers[here] = answer.mul_(shares[here, None])
        # every token's choices one after another: added up in the same order every time
        return answers.view(choices, *hidden_states.shape).sum(0, dtype=torch.float32)

    def _answers(self, first: int, ends: Tensor, x: Tensor) -> Tensor:
        """The answers of experts from the `first` on to x (rows, k), in which the rows of each end there."""
        return self._normed(self._products(self.roles[-1], first, ends, self._inner(first, ends, x)))

    def _inner(self, first: int, ends: Tensor, x: Tensor) -> Tensor:
        """What their last linears read."""
        return self._activated([self._products(role, first, ends, x) for role in self.roles[:-1]])

    def _products(self, role: str, first: int, ends: Tensor, x: Tensor) -> Tensor:
        """What their linears of a role give."""
        linears = [self.linear(first + number, role) for number in range(len(ends))]
        y = grouped_mm(x, torch.stack([one.weight for one in linears]).mT, offs=ends.to(torch.int32))
        if self.has_bias:
            biases = torch.stack([one.bias for one in linears])
            y += biases.repeat_interleave(_sizes(ends), 0, output_size=len(x))
        return y

    def _can_group(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether what is done `in_groups` can be done so, for inputs of this type."""
        return _multiplies_groups(device, dtype) and self._aligned()

    def _aligned(self) -> bool:
        """Whether experts are dense, and their rows begin at multiples of 16 bytes."""
        linears = [self.linear(0, role) for role in self.roles]
        return all(
            type(one) is Unfilled and not any(size % 8 for size in one.weight.shape) for one in linears
        )

    def _at_once(self, number: int) -> int:
        """How many experts are multiplied as one, by the weights of this one."""
        return max(1, GROUPED // int(self.linear(number, self.roles[0]).weight.nbytes))

    def linear(self, number: int, role: str) -> Any:
        """The linear of an expert by its role, dense or packed."""
        return getattr(getattr(self, str(number)), role)

    def inner(self, x: Tensor, pieces: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        """What the last linears of experts read, in the type of x (rows, k), computed in `dtype`.

        It is given for pieces of x: of each the number of its expert, in ascending order, and its rows.
        """
        if self._can_group(x.device, dtype):
            return self.inner_in_groups(x, pieces, dtype)
        return [self._inner_of(number, x[rows].to(dtype)).to(x.dtype) for number, rows in pieces]

    def inner_in_groups(
        self, x: Tensor, pieces: Sequence[tuple[int, Tensor]], dtype: torch.dtype
    ) -> list[Tensor]:
        """What `inner` gives, with the products of many experts as one."""
        found: list[Tensor] = []
        at_once = self._at_once(pieces[0][0]) if pieces else 1
        for some in _batches(pieces, at_once, rows=GROUPED // (x.shape[1] * dtype.itemsize)):
            sizes = [len(rows) for _, rows in some]
            first, last = some[0][0], some[-1][0]
            of_each = [0] * (last + 1 - first)
            for (number, _), size in zip(some, sizes, strict=True):
                of_each[number - first] += size
            # not waited for, so that the host goes on
            ends = torch.tensor(of_each).cumsum(0).to(x.device, non_blocking=True)
            rows = torch.cat([rows for _, rows in some])
            found += self._inner(first, ends, x[rows].to(dtype)).to(x.dtype).split(sizes)
        return found

    def _inner_of(self, number: int, x: Tensor) -> Tensor:
        """The same of one expert, for inputs x (tokens, k)."""
        return self._activated([self.linear(number, role)(x) for role in self.roles[:-1]])

    def _activated(self, outputs: list[Tensor]) -> Tensor:
        """What becomes of the outputs of an expert's first linears."""
        if len(outputs) == 1:
            return self.act_fn(outputs[0])
        interleaved = self.stacks[0].interleaved
        both = torch.stack(outputs, -1).flatten(-2) if interleaved else torch.cat(outputs, -1)
        return self._apply_gate(both)

    def answer(self, number: int, x: Tensor) -> Tensor:
        """An expert's answer to x (tokens, k)."""
        return self._normed(self.linear(number, self.roles[-1])(self._inner_of(number, x)))

    def _normed(self, answer: Tensor) -> Tensor:
        return self.post_expert_norm(answer) if self.has_post_expert_norm else answer


def _multiplies_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for grouped products: without one it does them one after another."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


class Unfilled(nn.Linear):
    """A linear on the meta device that no values are drawn for: of the largest mixtures that took seconds."""

    def reset_parameters(self) -> None:
        """Leave it as it is."""


class ScoresOnInputs(nn.Module):
    """What take_apart makes of a mixture whose experts read a token times its score, as Llama 4's do.

    transformers hands every expert all tokens, with a score of 0 where they do not go to it. Here an expert
    reads the tokens that do.
    """

    top_k: int
    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the experts' answers to hidden_states (..., k), (tokens, k), and the router's logits."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(x)
        scores, index = scores.topk(self.top_k)  # of all others they are 0
        scaled = (x[:, None] * scores[..., None]).flatten(0, 1)
        answers = self.experts(scaled, index.reshape(-1, 1), torch.ones_like(scores).reshape(-1, 1))
        total = answers.unflatten(0, scores.shape).sum(1)
        return self.shared_expert(x) + total, logits


def routed(top_k_index: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Of every expert the tokens that go to it, and as which of their choices, in transformers' order.

    top_k_index (tokens, choices); what is no number of one of the `count` experts goes nowhere.
    """
    places, ends = _by_expert(top_k_index, count)
    sizes = _sizes(ends).tolist()
    places = places[: sum(sizes)]
    tokens, choices = places % len(top_k_index), places // len(top_k_index)
    return list(zip(tokens.split(sizes), choices.split(sizes), strict=True))


def _by_expert(top_k_index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of top_k_index (tokens, choices), a choice after another, by expert; where those of each end."""
    chosen = top_k_index.T.flatten()
    # few bits are sorted in few passes
    numbers = torch.where(chosen < 0, count, chosen).clamp(max=count).to(torch.int16)
    numbers, places = numbers.sort(stable=True)
    every = torch.arange(count, dtype=torch.int16, device=numbers.device)
    return places, torch.searchsorted(numbers, every, right=True)


def _batches(
    pieces: Sequence[tuple[int, Tensor]], most: int, *, rows: int
) -> Iterator[list[tuple[int, Tensor]]]:
    """Pieces, some after others: `most` of them and so many rows at most, or one."""
    some: list[tuple[int, Tensor]] = []
    for piece in pieces:
        if some and (len(some) == most or sum(len(own) for _, own in (*some, piece)) > rows):
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def _sizes(ends: Tensor) -> Tensor:
    """How many are in each of some pieces that follow one another, by where they end."""
    return ends.diff(prepend=ends.new_zeros(1))


def take_apart(model: PreTrainedModel) -> None:
    """Give every expert of a model on the meta device linears of its own, in place of its stacked weights.

    They are called as in files with a tensor an expert, as transformers knows them for the model's type.
    """
    _adapt(model)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    ]
    known = converters_of(model) if found else []
    for path, module in found:
        _take_apart(path, module, known)


def _adapt(model: PreTrainedModel) -> None:
    """Let experts be of the interface that are stacked as its own are, but have a forward of their own.

    They must be handed what the interface hands, and say how they apply their gates; or be handed tokens
    times their scores, by a mixture that ScoresOnInputs can be.
    """
    for path, module in model.named_modules():
        if hasattr(module, "has_gate") or module._parameters.keys() != {GATE_UP, DOWN}:
            continue
        handed = tuple(signature(module.forward).parameters)
        around: Any = model.get_submodule(path.rpartition(".")[0])
        if handed == HANDED[:1] and around._modules.keys() == {"experts", "router", "shared_expert"}:
            around.__class__ = _as_well(ScoresOnInputs, around.__class__)
        elif handed != HANDED or not hasattr(module, "_apply_gate"):
            continue
        first, last = module._parameters.values()
        module.has_gate, module.has_bias, module.is_concatenated = True, False, True
        module.is_transposed = first.shape[2] == 2 * last.shape[1]


def _take_apart(path: str, module: Any, known: list[WeightConverter]) -> None:
    first, last = (GATE_UP if module.has_gate else UP), DOWN
    stacks = [module._parameters.pop(name) for name in (first, last)]
    for name in (first, last) if module.has_bias else ():
        del module._parameters[f"{name}_bias"]
    count, n, k = stacks[0].shape
    n, k = (k, n) if module.is_transposed else (n, k)
    inner = n // 2 if module.has_gate else n
    outputs = stacks[1].shape[2 if module.is_transposed else 1]
    names = (*_names(path, first, known, (GATE, UP) if module.has_gate else (UP,)),
             *_names(path, last, known, (DOWN,)))  # fmt: skip
    module.count, module.roles = count, names
    module.stacks = (
        Stacked(f"{path}.{first}", names[:-1], (n, k), not module.is_concatenated, module.is_transposed),
        Stacked(f"{path}.{last}", names[-1:], (outputs, inner), False, module.is_transposed),
        Stacked(f"{path}.{first}_bias", names[:-1], (n,), not module.is_concatenated, False),
        Stacked(f"{path}.{last}_bias", names[-1:], (outputs,), False, False),
    )
    module.__class__ = _as_well(Experts, module.__class__)
    module._is_hf_initialized = True  # _init_weights looks for what was stacked
    for number in range(count):
        expert = nn.Module()
        for role in names[:-1]:
            expert.add_module(role, Unfilled(k, inner, bias=module.has_bias, device="meta"))
        expert.add_module(names[-1], Unfilled(inner, outputs, bias=module.has_bias, device="meta"))
        module.add_module(str(number), expert)


@cache
def _as_well(ours: Any, theirs: Any) -> Any:
    """The class of a module of theirs that is one of ours too: the same for all that are alike."""
    gate = ours is Experts and not hasattr(theirs, "_apply_gate")
    return type(ours.__name__, (ours, theirs), {"_apply_gate": _default_apply_gate} if gate else {})


def _names(path: str, stacked: str, known: list[WeightConverter], usual: tuple[str, ...]) -> tuple[str, ...]:
    """What the linears that make a stacked weight are called in files with a tensor an expert."""
    for converter in filter(merges_experts, known):
        if any(f".{path}.{stacked}".endswith(f".{to}") for to in plain(converter.target_patterns)):
            sources = plain(converter.source_patterns)
            found = tuple(one.removesuffix(".weight").rpartition(".")[2] for one in sources)
            if len(found) == len(usual):
                return found
    return usual


def plain(patterns: list[str]) -> list[str]:
    """Patterns of names without what only a pattern has."""
    return [pattern.replace("\\", "").lstrip(".") for pattern in patterns]


def converters_of(model: PreTrainedModel) -> list[WeightConverter]:
    """What transformers does to the tensors of a model of this type while it loads them."""
    return [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]


def merges_experts(converter: WeightConverter) -> bool:
    """Whether a converter stacks the weights of experts that are in files one by one."""
    stacks = any(isinstance(one, MergeModulelist) for one in converter.operations)
    return stacks and any("expert" in to for to in converter.target_patterns)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The experts of a model that was taken apart, by their paths."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield path, module


def refuse_others(model: PreTrainedModel, way_out: str) -> None:
    """Raise SourceError for experts in stacked weights that are none of the interface's."""
    for name, module in model.named_modules():
        stacked = any(
            parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values()
        )
        if stacked and "expert" in f"{name} {type(module).__name__}".lower():
            raise SourceError(
                f"{model.config.model_type!r} has experts of a kind of its own ({name}, "
                f"{type(module).__name__}); they are not supported yet.",
                way_out,
            )
