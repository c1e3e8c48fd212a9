"""Find the structure of a model: it is run once, on tensors that have shapes and no values.

So nothing is computed and nothing has to be made smaller: the run takes some hundredths of a second a block,
whatever the model's size. Storages tell which linears read one input, and what is made from what.
"""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from marlin_convert.errors import SourceError
from marlin_convert.models.experts import Experts, refuse_others
from marlin_convert.models.structure import Part, Residual, Stage, Structure

# Samples and tokens of the run. No model has five of anything, so the samples are found again in a shape.
SHAPE = 5, 24

# A linear with fewer outputs than this is a gate or a step size, and no layout of engines holds it.
NARROW = 32

# What engines build unquantized: by the path inside the block, and why.
UNQUANTIZED = {
    "*.altup.*": "mixes streams of hidden states",
    "*.per_layer_*": "puts the per-layer input in",
    "*.in_proj_[ab]": "gates of a linear attention",
    "*.in_proj_ba": "gates of a linear attention",
    "*.dt_proj": "step sizes of a mixer",
    "*.x_proj": "step sizes of a mixer",
    "*.indexer.*": "chooses the tokens that are attended to",
}
Modules = Mapping[str, nn.Module]  # all of a model, by their paths

NOT_FOR_TEXT = "never sees text: of a tower for pictures or sound, or of its projector"
OUTSIDE = "outside of the blocks"

# Structures that are kept: a command asks for those of a model and of its source several times.
KEPT = 4
_found: dict[Hashable, Structure] = {}

# Of what cannot be taken block by block.
WAY_OUT = "serve it as it is, or let an engine round it while it loads it."


@dataclass
class _Call:
    """One call of a module; `versions` are of the tensors it was handed, as they were then."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]
    output: Any = None

    @property
    def given(self) -> Any:
        """The first value that was returned."""
        return self.output[0] if isinstance(self.output, tuple | list) else self.output


@dataclass
class _Operation:
    """One operation on tensors, and what it gave."""

    kind: Any
    args: tuple[Any, ...]
    given: Any


@dataclass
class _Reads(TorchDispatchMode):
    """What every storage was computed from and what was computed from it, as long as the mode is on."""

    of: dict[int, set[int]] = field(default_factory=dict)
    readers: dict[int, list[_Operation]] = field(default_factory=dict)  # kept: storages keep their places

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            given = operation(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if operation is not torch.ops.aten._local_scalar_dense.default:
                raise
            # a value decides, as the last position does in dynamic rope: there is none, and 0 will do
            given = 0.0 if args[0].dtype.is_floating_point else 0
        read = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        called = _Operation(operation, args, given)
        for one in read or {0}:
            self.readers.setdefault(one, []).append(called)
        for x in tree_leaves(given):
            if isinstance(x, Tensor):
                self.of.setdefault(_storage(x), set()).update(read - {_storage(x)})
        return given

    def behind(self, x: Tensor) -> set[int]:
        """Every storage that x was computed from."""
        found: set[int] = set()
        todo = {_storage(x)}
        while todo:
            found |= todo
            todo = set().union(*(self.of.get(one, set()) for one in todo)) - found
        return found

    def added_to(self, x: Tensor) -> tuple[Tensor, float, Tensor] | None:
        """The r and m of the sum r + m x that x goes into and nowhere else, and the sum; None if not so."""
        aten, multiplier = torch.ops.aten, 1.0
        while True:
            readers = [
                one
                for one in self.readers.get(_storage(x), ())
                if isinstance(one.given, Tensor)
                if one.kind._schema.is_mutable or not _is_view_of(one.given, x)
            ]
            if len(readers) != 1 or readers[0].kind._schema.is_mutable:
                return None
            (reader,) = readers
            match reader.kind, reader.args:
                case aten.add.Tensor, (Tensor() as one, Tensor() as other) if one.shape == other.shape:
                    return (other if _storage(one) == _storage(x) else one), multiplier, reader.given
                case aten.mul.Tensor, (_, float() | int() as factor):
                    multiplier *= factor
                case ((aten._to_copy.default | aten.clone.default), _):
                    pass
                case _:
                    return None
            x = reader.given


def discover(model: PreTrainedModel) -> Structure:
    """The structure of a causal language model whose tensors are on the meta device.

    SourceError for one that cannot be taken block by block, and why.
    """
    known = _made_of(model)
    if known not in _found:
        found = _discover(model)
        while len(_found) >= KEPT:
            del _found[next(iter(_found))]
        _found[known] = found
    return _found[known]


def _made_of(model: PreTrainedModel) -> Hashable:
    """All that a structure depends on: of models that are alike in it the second is not run."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): number for number, (_, tensor) in reversed([*enumerate(tensors)])}
    return (
        model.config.to_json_string(),
        model.config._attn_implementation,
        NARROW,
        tuple((path, type(module), type(module).forward) for path, module in model.named_modules()),
        tuple((name, tensor.shape, tensor.dtype, first[id(tensor)]) for name, tensor in tensors),
    )


def _discover(model: PreTrainedModel) -> Structure:
    refuse_others(model, WAY_OUT)
    modules = dict(model.named_modules())
    experts = {path: module for path, module in modules.items() if isinstance(module, Experts)}
    calls, reads, storages = _run(model, experts.values())
    blocks = _block_list(model, modules, calls)
    of_blocks = _block_calls(model, modules, blocks, calls)
    handed = _check_chain(of_blocks, reads)
    inside = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}.")
    }
    routers = {call.path for call in calls if isinstance(call.output, tuple)}
    dense = {}
    for name, linear in inside.items():
        path = name.removeprefix(f"{blocks}.").partition(".")[2]
        why = next((why for pattern, why in UNQUANTIZED.items() if fnmatchcase(f".{path}", pattern)), None)
        if name in routers:
            why = "sends tokens to experts"
        if why or linear.out_features < NARROW:
            dense[name] = why or f"has only {linear.out_features} outputs"
    _check_linears(model, blocks, inside, dense, experts, calls)
    parts = tuple(
        tuple(
            _parts(
                call, [one for one in calls if one.path.startswith(f"{call.path}.")], dense, experts, reads
            )
        )
        for call in of_blocks
    )
    called = {call.path for call in calls}
    head = model.get_output_embeddings()
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in inside:
            if module is not head:
                dense[name] = OUTSIDE if name in called else NOT_FOR_TEXT
            elif name != "lm_head":  # which engines know without being told
                dense[name] = "the head"
    read = set().union(*reads.of.values())
    batch_axis = _hidden(of_blocks[0]).shape.index(SHAPE[0])
    return Structure(
        blocks=blocks,
        parts=parts,
        dense=dense,
        returns=tuple(len(call.output) if isinstance(call.output, tuple) else 0 for call in of_blocks),
        batch_axis=batch_axis,
        handed=handed,
        idle=frozenset(
            name
            for name, storage in storages.items()
            if storage not in read
            and name.rpartition(".")[0] not in called
            and not name.startswith(f"{blocks}.")
        ),
    )


def _type(model: PreTrainedModel) -> str:
    return repr(model.config.model_type)


def _takes(model: PreTrainedModel) -> str:
    return ", it takes images too" if hasattr(model.config, "vision_config") else ""


def _storage(x: Tensor) -> int:
    """What two tensors have in common that are views of one."""
    return x.untyped_storage()._cdata


def _is_view_of(one: Any, x: Tensor) -> bool:
    """Whether this is x seen in another way and not computed from it."""
    return isinstance(one, Tensor) and _storage(one) == _storage(x)


def _same_memory(one: Any, other: Any) -> bool:
    """Whether two tensors are one, or views of one that show the same."""
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and _storage(one) == _storage(other)
        and (one.shape, one.stride(), one.storage_offset())
        == (other.shape, other.stride(), other.storage_offset())
    )


def _run(model: PreTrainedModel, experts: Iterable[Experts]) -> tuple[list[_Call], _Reads, dict[str, int]]:
    """Every call of a module in the order they began, what was made from what, and where tensors were."""
    calls: list[_Call] = []
    running: list[_Call] = []
    reads = _Reads()

    def begins(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            handed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            call = _Call(path, module, args, dict(kwargs), [(x, x._version) for x in handed])
            calls.append(call)
            running.append(call)

        return hook

    def ends(_: nn.Module, __: Any, output: Any) -> None:
        running.pop().output = output

    with ExitStack() as stack:
        for one in experts:  # the first of them is run for all
            stack.callback(one._modules.update, dict(one._modules))
            for number in range(1, one.count):
                del one._modules[str(number)]
        met = list(model.named_modules())
        for _, module in met:  # some keep tensors from call to call, here without values
            stack.callback(vars(module).update, dict(vars(module)))
        for path, module in met:
            for handle in (
                module.register_forward_pre_hook(begins(path), with_kwargs=True),
                module.register_forward_hook(ends),
            ):
                stack.callback(handle.remove)
        # of a model that does not run we tell ourselves
        traces = logging.getLogger(FakeTensorMode.__module__)
        stack.callback(setattr, traces, "disabled", traces.disabled)
        traces.disabled = True
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        stack.enter_context(reads)
        text = {"input_ids": torch.zeros(SHAPE, dtype=torch.long), "use_cache": False}
        try:
            functional_call(model, tensors, kwargs=text)
        except Exception as error:  # it can be in need of as many things as there are models
            why = " ".join(str(error).split())
            raise SourceError(
                f"{_type(model)} does not run on the ids of a text alone{_takes(model)}: {why.rstrip('.')}.",
                WAY_OUT,
            ) from error
    return calls, reads, {name: _storage(tensor) for name, tensor in tensors.items()}


def _block_list(model: PreTrainedModel, modules: Modules, calls: Sequence[_Call]) -> str:
    """The path of the largest list of modules that are called."""
    called = {call.path.rpartition(".")[0] for call in calls}
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and path in called
    }
    if not sizes:
        raise SourceError("config.json means a model without blocks that could be taken one by one.", WAY_OUT)
    blocks = max(sizes, key=sizes.__getitem__)
    others = [
        path
        for path, size in sizes.items()
        if size > sizes[blocks] / 10 and not f"{path}.".startswith(f"{blocks}.")
    ]
    if others:
        raise SourceError(
            f"{_type(model)} has two lists of blocks, {blocks} and {others[0]}; one can be walked.", WAY_OUT
        )
    return blocks


def _block_calls(
    model: PreTrainedModel, modules: Modules, blocks: str, calls: Sequence[_Call]
) -> list[_Call]:
    """The call of every block; SourceError where one is called twice, or out of order."""
    found = [call for call in calls if call.path.rpartition(".")[0] == blocks]
    order = [call.path.rpartition(".")[2] for call in found]
    count = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    if order != [str(i) for i in range(count)]:
        shown = ", ".join(order[:8]) + (", ..." if len(order) > 8 else "")
        raise SourceError(
            f"on text {_type(model)} runs of its {count} blocks {shown}; it can be taken block by block only "
            "if each is run once, one after another.",
            WAY_OUT,
        )
    for name, module in modules.items():
        # of models that take images too, text may look ahead in a prompt; they are run as they run on text
        if (
            name.startswith(f"{blocks}.")
            and getattr(module, "is_causal", True) is False
            and not hasattr(model.config, "vision_config")
        ):
            raise SourceError(
                f"{_type(model)} is an encoder, or works with one: {name} is not causal.", WAY_OUT
            )
    owner: dict[int, str] = {}
    for call in found:
        for parameter in call.module.parameters():
            if owner.setdefault(id(parameter), call.path) != call.path:
                raise SourceError(f"{owner[id(parameter)]} and {call.path} share weights.", WAY_OUT)
    return found


def _check_chain(blocks: Sequence[_Call], reads: _Reads) -> dict[int | str, int]:
    """What else a block is handed of what the one before returns: the place of each, by argument.

    SourceError where more goes from block to block than that, the hidden states and what blocks share. What
    they write into a dictionary that all are handed (shared keys and values) stays there.
    """
    handed: dict[int | str, int] = {}
    for before, call in pairwise(blocks):
        if not _same_memory(_hidden(call), before.given):
            raise SourceError(
                f"{call.path} is not handed what {before.path} gives, but something made of it.", WAY_OUT
            )
    given: set[int] = set()
    for number, call in enumerate(blocks):
        hidden = _hidden(call)
        earlier = blocks[number - 1].output if number else None
        said: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        for name, value in said:
            place = _place(value, earlier) if value is not hidden else 0
            if place and handed.setdefault(name, place) == place:
                continue
            for x in () if isinstance(value, dict) else tree_leaves(value):
                if isinstance(x, Tensor) and x is not hidden and given & reads.behind(x):
                    raise SourceError(
                        f"{call.path} is handed {name}, which earlier blocks have made.", WAY_OUT
                    )
        for x, version in call.versions:
            if x is not hidden and x._version != version:
                raise SourceError(f"{call.path} writes into a tensor that it is handed.", WAY_OUT)
        given |= {_storage(x) for x in tree_leaves(call.output) if isinstance(x, Tensor)}
    return handed


def _place(value: Any, output: Any) -> int:
    """Where a value stands in what was returned, past the hidden states; 0 if it does not."""
    places = range(1, len(output)) if isinstance(output, tuple) and isinstance(value, Tensor) else ()
    return next((i for i in places if _same_memory(value, output[i])), 0)


def _hidden(call: _Call) -> Tensor:
    """The hidden states among the arguments of a block's call."""
    found = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if not isinstance(found, Tensor) or SHAPE[0] not in found.shape:
        raise SourceError(f"{call.path} is not handed hidden states of every sample.", WAY_OUT)
    return found


def _check_linears(
    model: PreTrainedModel,
    blocks: str,
    linears: dict[str, nn.Linear],
    dense: dict[str, str],
    experts: Mapping[str, Experts],
    calls: Sequence[_Call],
) -> None:
    """Raise SourceError where the linears of the blocks are not what their work is done by."""
    matrices = {
        name: parameter.numel()
        for name, parameter in model.get_submodule(blocks).named_parameters()
        if parameter.dim() >= 2
    }
    of_linears = sum(linear.weight.numel() for linear in linears.values())
    if 2 * of_linears < sum(matrices.values()):
        other = max(
            (name for name in matrices if f"{blocks}.{name.rpartition('.')[0]}" not in linears),
            key=matrices.__getitem__,
        )
        kind = type(model.get_submodule(f"{blocks}.{other.rpartition('.')[0]}")).__name__
        raise SourceError(
            f"{_type(model)} keeps most weights of its blocks in {kind}, not in nn.Linear: {blocks}.{other}.",
            WAY_OUT,
        )
    times = Counter(call.path for call in calls)
    # who goes to which expert is not known: one of them was called for all
    routed = {
        f"{path}.{name}" for path, one in experts.items() if times[path] for name, _ in one.named_modules()
    }
    never = [name for name in linears if not times[name] and name not in dense and name not in routed]
    if never:
        more = f" (and {len(never) - 1} more)" if len(never) > 1 else ""
        raise SourceError(f"{never[0]}{more} is never called on text: its inputs are not known.", WAY_OUT)
    often = [name for name in linears if times[name] > 1 and name not in dense]
    if often:
        raise SourceError(
            f"{often[0]} is called {times[often[0]]} times in its block, with inputs that differ.", WAY_OUT
        )


def _parts(
    whole: _Call,
    calls: Sequence[_Call],
    dense: dict[str, str],
    experts: Mapping[str, Experts],
    reads: _Reads,
) -> Iterator[Part]:
    """The parts of a block, from its call and those inside of it."""
    block = whole.path
    stages: dict[tuple[Any, ...], list[str]] = {}
    output_of: dict[str, Tensor] = {}
    inside = tuple(f"{path}." for path in experts if path.startswith(f"{block}."))
    for call in calls:
        if call.path in experts:
            stages[("experts", call.path)] = [call.path.removeprefix(f"{block}.")]
        if inside and call.path.startswith(inside):
            continue
        if isinstance(call.module, nn.Linear) and call.path not in dense:
            path = call.path.removeprefix(f"{block}.")
            x = call.args[0] if call.args else call.kwargs["input"]
            # what parallel parts read is one tensor too, but they are fused by no engine
            key = (path.rpartition(".")[0], _storage(x), x.storage_offset(), x.numel(), call.versions[0][1])
            if path not in output_of:
                stages.setdefault(key, []).append(path)
            output_of[path] = call.output
    ordered = [tuple(stage) for stage in stages.values()]
    while ordered:
        if (of := experts.get(f"{block}.{ordered[0][0]}")) is not None:
            (call,) = (call for call in calls if call.path == f"{block}.{ordered[0][0]}")
            yield _part_of_experts(ordered[0][0], of, call)
            ordered = ordered[1:]
            continue
        child = ordered[0][0].partition(".")[0]
        count = next(
            (
                i
                for i, stage in enumerate(ordered)
                if stage[0].partition(".")[0] != child or f"{block}.{stage[0]}" in experts
            ),
            len(ordered),
        )
        mine, ordered = ordered[:count], ordered[count:]
        of_child = [call for call in calls if call.path == f"{block}.{child}"]
        part = _part(child, tuple(mine), of_child, output_of, ordered)
        if part.module:
            output, norm = _through_norm(block, calls, output_of[part.last[0]])
            residual = _residual(part, whole, calls, reads.added_to(output))
            part = replace(part, residual=residual and replace(residual, norm=norm))
        yield part


def _part_of_experts(path: str, experts: Experts, call: _Call) -> Part:
    """The part of a module of experts: two stages for each of them, one expert after another."""
    index = call.args[1] if len(call.args) > 1 else call.kwargs["top_k_index"]
    *first, last = experts.roles
    stages = [
        tuple(f"{path}.{number}.{role}" for role in roles)
        for number in range(experts.count)
        for roles in (first, (last,))
    ]
    return Part(path, tuple(stages), experts=experts.count, choices=index.shape[-1])


def _through_norm(block: str, calls: Sequence[_Call], x: Tensor) -> tuple[Tensor, str]:
    """What a norm of the block makes of x, and the norm's path in it; x and "" where none reads x."""
    for call in calls:
        path = call.path.removeprefix(f"{block}.")
        names = [name for name, _ in call.module.named_parameters()]
        if "." not in path and names == ["weight"] and call.args and _same_memory(call.args[0], x):
            return call.given, path
    return x, ""


def _residual(
    part: Part, block: _Call, calls: Sequence[_Call], added: tuple[Tensor, float, Tensor] | None
) -> Residual | None:
    """Where to find what the output of a part is added to: a module of the block reads it before.

    None where something else is added to the sum, as in blocks whose attention and MLP run side by side: it
    must be what a module reads, or what the block gives.
    """
    if added is None:
        return None
    residual, multiplier, total = added
    handed = [call.args[0] for call in calls if call.args]
    if not any(_is_view_of(x, total) for x in (*handed, block.given)):
        return None
    for call in calls:
        path = call.path.removeprefix(f"{block.path}.")
        if path == part.last[0]:
            break
        first = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
        if _same_memory(first, residual) and "." not in path:
            return Residual(path, multiplier)
    return None


def _part(
    child: str,
    stages: tuple[Stage, ...],
    calls: Sequence[_Call],
    output_of: dict[str, Tensor],
    later: Sequence[Stage],
) -> Part:
    """The part of a block's child; without a module unless its output is its last linear's."""
    last = stages[-1]
    again = any(stage[0].partition(".")[0] == child for stage in later)
    if len(last) == 1 and len(calls) == 1 and not again:
        output, pair = calls[0].output, False
        if isinstance(output, tuple) and len(output) == 2:
            weights = output[1]
            pair = weights is None or (isinstance(weights, Tensor) and weights.dim() == 4)
            output = output[0] if pair else None
        if _same_memory(output, output_of[last[0]]):
            return Part(child, stages, pair)
    return Part("", stages)
