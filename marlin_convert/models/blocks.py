"""A model taken apart: everything outside its decoder blocks in memory, its blocks loaded one at a time."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from marlin_convert.checkpoint.linears import Weights, is_finite
from marlin_convert.errors import SourceError
from marlin_convert.models.discover import discover
from marlin_convert.models.experts import Unfilled
from marlin_convert.models.memory import free_memory, give_back
from marlin_convert.models.tree import config_errors, module_tree


@dataclass(frozen=True)
class Arguments:
    """What a block is handed beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorded(BaseException):
    """Breaks off a forward after its last block; a BaseException so that no model code catches it."""


def bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class BlockModel:
    """A causal language model run one decoder block at a time.

    `weights` gives the parameters as floats whatever they are stored as. On `device` there is the block
    that is loaded and, from its first use to `unload_outside`, what is outside of the blocks: embedding,
    norms and, for logits, the output projection. Of experts, so many in a module, there are those whose
    numbers `experts` gives.

    `dtype` is the model's own type unless another is given, and that of the hidden states between blocks. A
    GPU computes in it, a CPU in float32 (which is faster there, and rounds less). With `fast`, linears on a
    CPU take and give what `dtype` can hold, as on a GPU: activations can be kept in it without changing a
    number, and bfloat16 models are multiplied by the processor's bfloat16 units where it has them. Without,
    `overflows` has the linears of a float16 model that take or give what float16 cannot hold, and the largest
    magnitude: a GPU computes infinity there.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        fast: bool = True,
        trust_remote_code: bool = False,
        experts: Callable[[int], range] = range,
    ):
        self.weights = weights
        self.device = device
        self.dtype = dtype or weights.own_dtype
        self.compute_dtype = torch.float32 if device.type == "cpu" else self.dtype
        self._linears_round = fast and self.compute_dtype != self.dtype
        self.bf16_products = self._linears_round and self.dtype == torch.bfloat16 and bf16_units()
        self._product_dtype = torch.bfloat16 if self.bf16_products else self.compute_dtype
        self.model = module_tree(weights, trust_remote_code=trust_remote_code)
        self.structure = discover(self.model)
        blocks = self.model.get_submodule(self.structure.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self._elsewhere = {
            f"{path}.{number}"
            for path, count in self.structure.experts.items()
            for number in set(range(count)) - set(experts(count))
        }
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, Future[dict[tuple[str, str], Tensor]]] = {}
        self.overflows: dict[str, float] = {}
        if self.dtype == torch.float16 and self.compute_dtype != self.dtype and not fast:
            for path, module in self.model.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(partial(self._watch, path))
        self._has_outside = self._has_head = False

    def _watch(self, path: str, _: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
        """Note what a linear takes or gives that float16 cannot hold."""
        most = max(float(value) for x in (taken[0], given) for value in torch.stack(x.aminmax()).abs())
        if most > torch.finfo(torch.float16).max:
            self.overflows[path] = max(most, self.overflows.get(path, 0.0))

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, i: int) -> str:
        """The module path of block i."""
        return f"{self.structure.blocks}.{i}"

    def load_outside(self, *, head: bool) -> None:
        """Have what is outside of the blocks on the device; the output projection if `head` is wanted.

        One that is tied to the embedding is there with it.
        """
        if self._has_outside and (self._has_head or not head):
            return
        self._has_outside, self._has_head = True, head
        inside = self.structure.blocks + "."
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        output = None if head else self.model.get_output_embeddings()
        for path, module in self.model.named_modules():
            if path == self.structure.blocks or path.startswith(inside):
                continue
            prefix = f"{path}." if path else ""
            for name, parameter in list(module._parameters.items()):
                full_name = prefix + name
                if parameter is None or not parameter.is_meta:
                    continue
                if module is output and full_name not in tied:
                    continue
                if full_name in self.structure.idle:
                    # of no size in memory, but there: a model asks its first parameter for the device
                    nothing = torch.zeros((), dtype=parameter.dtype, device=self.device).expand(
                        parameter.shape
                    )
                    module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
                elif full_name not in tied or full_name in self.weights:
                    self._assign(module, name, self._fetch(full_name, module, name))
        self.model.tie_weights()
        for path, module in self.model.named_modules():
            if not path.startswith(inside):
                self._compute_buffers(path, module)

    def unload_outside(self) -> None:
        """Free what is outside of the blocks, none of which is loaded, until it is used again."""
        nn.Module.to(self.model, "meta")
        self._has_outside = self._has_head = False

    def _fetch(self, full_name: str, module: nn.Module, name: str) -> Tensor:
        """A parameter on the device, checked, in the type it is computed with."""
        expected = module._parameters[name]
        assert expected is not None
        value = self.weights.read(full_name, self.device)
        if value.shape != expected.shape:
            raise SourceError(
                f"{full_name} has shape {tuple(value.shape)}, its config.json means {tuple(expected.shape)}.",
                "the config.json may be of another model.",
            )
        if not is_finite(value):
            raise SourceError(f"{full_name} holds NaN or Inf.", "the source is damaged; fetch it again.")
        if self.dtype == torch.float16 != value.dtype and not is_finite(value.half()):
            raise SourceError(
                f"{full_name} does not fit float16: its largest value is {value.abs().max()}.",
                "compute and write it in bfloat16, which reaches further, with --dtype bfloat16.",
            )
        return value.to(self._product_dtype if _is_plain(module) else self.compute_dtype)

    def _assign(self, module: nn.Module, name: str, value: Tensor) -> None:
        if _is_plain(module) and self._linears_round:
            module.forward = partial(rounding_linear, module, self.dtype)  # type: ignore[method-assign]
        parameter = nn.Parameter(value, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # _init_weights leaves it alone
        module._parameters[name] = parameter

    def _compute_buffers(self, path: str, module: nn.Module) -> None:
        """Give a module its buffers: those of the checkpoint, and those that no checkpoint holds.

        The latter (rotary frequencies, embedding scales) are computed as transformers does.
        """
        prefix = f"{path}." if path else ""
        unknown = []
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta or prefix + name in self.structure.idle:
                continue
            if prefix + name in self.weights:
                value = self.weights.read(prefix + name, self.device)
                module._buffers[name] = value.to(self.compute_dtype) if value.is_floating_point() else value
            else:
                nothing = math.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, nothing, device=self.device)
                unknown.append(name)
        around = path
        while unknown:  # most are computed by the module itself, some by one around it
            with config_errors(self.weights.checkpoint.config):
                self._owner(around)._init_weights(self.model.get_submodule(around))
            unknown = [name for name in unknown if module.get_buffer(name).isnan().any()]
            if unknown and not around:
                raise SourceError(f"transformers computes no value for {prefix}{unknown[0]}.")
            around = around.rpartition(".")[0]

    def _owner(self, path: str) -> PreTrainedModel:
        """The innermost model that a module is part of: it knows how the module begins."""
        parts = path.split(".") if path else []
        modules = (self.model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1))
        return next(module for module in modules if isinstance(module, PreTrainedModel))

    def load(self, i: int) -> nn.Module:
        """Block i with its weights on the device, for as long as the caller keeps it loaded.

        The block after it is read meanwhile, on a thread and a stream of their own, where a block takes less
        than a quarter of the memory that is free.
        """
        fetched = self._ahead.pop(i) if i in self._ahead else self._reader.submit(self._fetch_block, i)
        self._ahead.clear()
        values = fetched.result()
        size = sum(value.nbytes for value in values.values())
        if i + 1 < len(self) and 4 * size < free_memory(self.device):
            self._ahead[i + 1] = self._reader.submit(self._fetch_block, i + 1)
        for path, module in self.blocks[i].named_modules():
            for name in module._parameters:
                if (path, name) in values:
                    self._assign(module, name, values[path, name])
            self._compute_buffers(f"{self.name(i)}.{path}" if path else self.name(i), module)
        return self.blocks[i]

    def _fetch_block(self, i: int) -> dict[tuple[str, str], Tensor]:
        """The parameters of block i on the device, by module path inside the block and name."""
        values = {}
        stream = self._stream
        with torch.cuda.stream(stream):
            for path, module in self.blocks[i].named_modules():
                if f"{self.name(i)}.{path}".rpartition(".")[0] in self._elsewhere:
                    continue
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        full_name = ".".join(part for part in (self.name(i), path, name) if part)
                        values[path, name] = self._fetch(full_name, module, name)
        if stream is not None:
            stream.synchronize()
            for value in values.values():
                # its memory must not be reused here while the computing stream still reads it
                value.record_stream(torch.cuda.default_stream(self.device))
        return values

    def replace(self, linear: str, weight: Tensor) -> None:
        """Give a linear of the loaded block another weight (n, k)."""
        module = self.model.get_submodule(linear)
        dtype = self._product_dtype if _is_plain(module) else self.compute_dtype
        module.weight = nn.Parameter(weight.to(self.device, dtype), requires_grad=False)

    def unchanging(self, block: nn.Module) -> nn.Module:
        """A copy of a loaded block with the tensors that it has now, whatever `replace` gives it later."""
        kept: list[Any] = [*block.parameters(), *block.buffers()]
        kept += [module.config for module in block.modules() if hasattr(module, "config")]
        # experts that other processes have, which nothing replaces
        kept += [one for one in block.modules() if isinstance(one, Unfilled) and one.weight.is_meta]
        return copy.deepcopy(block, {id(one): one for one in kept})

    def unload(self, i: int) -> None:
        """Free the weights of block i."""
        self.blocks[i].to("meta")
        give_back()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """What enters block 0 for ids (batch, length), and what else every block is handed.

        What blocks hand on to later ones they write into a dictionary that all of them are handed.
        """
        self.load_outside(head=False)
        calls: list[Arguments] = []
        entering: list[Tensor] = []

        def record(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering.append(hidden)
            calls.append(Arguments(args[1:], {name: x for name, x in kwargs.items() if x is not hidden}))
            if len(calls) == len(self):
                raise _Recorded
            return hidden

        with suppress(_Recorded), self._blocks_replaced(record):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        return entering[0], calls

    def logits(self, ids: Tensor, hidden: Tensor, other: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (batch, length, vocabulary) from what left the last block for the same ids.

        `other` has tensors, by name, that are taken in place of the model's own.
        """
        self.load_outside(head=True)
        text = {"input_ids": ids.to(self.device), "use_cache": False}
        with self._blocks_replaced(lambda *_: hidden):
            return functional_call(self.model, dict(other or {}), kwargs=text).logits

    @contextmanager
    def _blocks_replaced(
        self, call: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """Let `call` give the hidden states that every block gives."""

        def replacement(i: int) -> Any:
            count = self.structure.returns[i]

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = call(i, args, kwargs)
                return (hidden, *[None] * (count - 1)) if count else hidden

            return forward

        for i, block in enumerate(self.blocks):
            block.forward = replacement(i)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear that does what linears do: some that route or work in groups do more."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def rounding_linear(linear: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    """A linear with input and output rounded to `dtype`, which multiplies in its weight's type."""
    rounded = x.to(dtype).to(linear.weight.dtype)
    return nn.functional.linear(rounded, linear.weight, linear.bias).to(dtype).to(x.dtype)
