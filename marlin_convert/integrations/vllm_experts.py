"""The experts of vLLM over the tensors of MARLIN files: split over ranks, on a GPU or a CPU.

vLLM keeps a matrix of all experts of a rank in one parameter, w13 (gate beside up) and w2 (down).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from marlin_convert import formats
from marlin_convert.errors import FormatError, SourceError
from marlin_convert.formats.scheme import groups_of
from marlin_convert.kernels.dequantized import dequantize
from marlin_convert.kernels.experts import MOST, GroupedExperts, Stack
from marlin_convert.kernels.matmul import check_scales

SUFFIXES = ("B", "s")
# What gate or up, and down, are called in the files of one family or another.
FIRST, LAST = ("gate_proj", "w1"), ("down_proj", "w2")


def stored_dense(scheme: formats.Scheme, prefix: str) -> bool:
    """Whether the config leaves the experts of a layer dense."""
    return any(scheme.skips(f"{prefix}.0.{last}") for last in LAST)


class MarlinExpertsMethod(FusedMoEMethodBase):
    """Packed experts: our kernel on a GPU; elsewhere dequantized once, after loading."""

    def __init__(self, scheme: formats.Scheme, prefix: str, moe: Any):
        """FormatError for experts that the kernel does not multiply; `moe` is vLLM's config of the layer."""
        super().__init__(moe)
        self.prefix = prefix
        self.schemes = {"w13": _scheme_of(scheme, prefix, FIRST), "w2": _scheme_of(scheme, prefix, LAST)}
        for found in self.schemes.values():
            if found.format != "marlin":
                raise self._refused(f"are stored as {found.format}")
        if moe.has_bias:
            raise self._refused("have biases")
        if not moe.is_act_and_mul:
            raise self._refused("have no gate")
        if moe.num_local_experts > MOST:
            raise self._refused(f"are {moe.num_local_experts} on a rank, of at most {MOST}")

    def _refused(self, why: str) -> FormatError:
        return FormatError(
            f"{self.prefix}: its experts {why}, for which the plugin has no kernel in vLLM.",
            "marlin-convert quantize DIR -o OTHER --format gptq repacks them exactly.",
        )

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Make the parameters of a rank's part of the experts; FormatError if it cannot have one."""
        if getattr(layer, "apply_router_weight_on_input", False):
            raise self._refused("multiply their inputs by the router's weights")
        part = intermediate_size_per_partition
        self.dtype, self.ranks = params_dtype, self.moe.tp_size
        self.shapes = {"w13": (hidden_size, 2 * part), "w2": (part, hidden_size)}
        self.groups = {
            "w13": groups_of(hidden_size, self.schemes["w13"].group_size),
            "w2": groups_of(part * self.ranks, self.schemes["w2"].group_size),
        }
        self.loaded: dict[str, set[tuple[str, int]]] = {}
        for weight, (k, n) in self.shapes.items():
            scheme = self.schemes[weight]
            width = n // 2 if weight == "w13" else n
            reason = formats.FORMATS["marlin"].refusal(k, width, bits=4, group_size=scheme.group_size)
            if reason:
                raise FormatError(
                    f"{self.prefix}: a rank gets {k} inputs, {width} outputs of an expert: marlin {reason}.",
                    "serve it with a smaller --tensor-parallel-size.",
                )
            for suffix, (dtype, shape) in formats.tensors(scheme, k, n).items():
                data = torch.empty(num_experts, *shape, dtype=dtype)
                parameter = Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader(layer, f"{weight}_{suffix}")  # type: ignore[attr-defined]
                layer.register_parameter(f"{weight}_{suffix}", parameter)
                self.loaded[f"{weight}_{suffix}"] = set()

    def _loader(self, layer: Any, name: str) -> Callable[..., bool | None]:
        """What puts a rank's part of a tensor of an expert in its place, and notes it."""

        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local == -1:
                return False if return_success else None
            into, rank = param.data[local], self.moe.tp_rank
            if shard_id == "w2":
                part, split = loaded_weight, name == "w2_B" or self.groups["w2"] > 1
                if split:
                    part = loaded_weight.narrow(0, rank * len(into), len(into))
            else:
                width = into.shape[1] // 2
                into = into.narrow(1, width * (shard_id == "w3"), width)
                part = loaded_weight.narrow(1, rank * width, width)
            into.copy_(part)
            self.loaded[name].add((shard_id, local))
            return True if return_success else None

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave what `apply` needs; SourceError when a tensor was not in the files."""
        tensors = {name: layer.get_parameter(name).data for name in self.loaded}
        for name, loaded in self.loaded.items():
            expected = len(tensors[name]) * (2 if name.startswith("w13") else 1)
            if len(loaded) != expected:
                raise SourceError(
                    f"{self.prefix}: of {expected} tensors for {name} the checkpoint has {len(loaded)}.",
                    "fetch it again.",
                )
        for weight, scales in (("w13", tensors["w13_s"]), ("w2", tensors["w2_s"])):
            check_scales(scales.flatten(0, 1), f"{self.prefix} {weight}")
            if self.groups[weight] > scales.shape[1] == 1:
                only = formats.FORMATS["marlin"].only_group
                tensors[f"{weight}_s"] = torch.stack([only(one) for one in scales])
        for name in tensors:
            delattr(layer, name)
        if tensors["w13_B"].is_cuda:
            kept = tensors
        else:
            kept = {weight: self._dense(weight, tensors) for weight in self.shapes}
        for name, tensor in kept.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.grouped = self._grouped(layer) if tensors["w13_B"].is_cuda else None

    def _dense(self, weight: str, tensors: dict[str, Tensor]) -> Tensor:
        """The weights (experts, n, k) of one matrix."""
        stacks = (tensors[f"{weight}_{suffix}"] for suffix in SUFFIXES)
        return torch.stack(
            [
                dequantize(
                    self.schemes[weight], dict(zip(SUFFIXES, one, strict=True)), self.dtype, one[0].device
                )
                for one in zip(*stacks, strict=True)
            ]
        )

    def _grouped(self, layer: nn.Module) -> GroupedExperts:
        B, s, down_B, down_s = (layer.get_parameter(name).data for name in ("w13_B", "w13_s", "w2_B", "w2_s"))
        inner = s.shape[2] // 2
        gate, up = (
            Stack(B[..., 2 * columns.start : 2 * columns.stop], s[..., columns])
            for columns in (slice(0, inner), slice(inner, 2 * inner))
        )
        fused = layer.activation == MoEActivation.SILU
        return GroupedExperts((gate, up), Stack(down_B, down_s), None if fused else self._activation(layer))

    def _activation(self, layer: Any) -> Callable[[Tensor], Tensor]:
        def activated(both: Tensor) -> Tensor:
            return apply_moe_activation(
                layer.activation, both.new_empty(len(both), both.shape[1] // 2), both.contiguous()
            )

        return activated

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Nothing: vLLM's own kernels do not multiply these."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The sums of the experts' answers to x (tokens, k), each times its share of a token."""
        if self.grouped is not None:
            shares = topk_weights if topk_weights.dtype == x.dtype else topk_weights.float()
            index = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.int()
            here = layer.expert_map
            return self.grouped(x, index, shares, None if here is None else here.int())
        total = torch.zeros_like(x, dtype=torch.float32)
        index = topk_ids.long() if layer.expert_map is None else layer.expert_map.long()[topk_ids.long()]
        activated = self._activation(layer)
        for expert in range(len(layer.w2)):
            tokens, choices = (index == expert).nonzero(as_tuple=True)
            if len(tokens):
                answer = linear(activated(linear(x[tokens], layer.w13[expert])), layer.w2[expert])
                total.index_add_(0, tokens, answer.float() * topk_weights[tokens, choices].float()[:, None])
        return total.to(x.dtype)


def _scheme_of(scheme: formats.Scheme, prefix: str, names: tuple[str, ...]) -> formats.Scheme:
    """How a matrix of the experts is stored, under whichever of these names it is in the files."""
    found = (scheme.of(f"{prefix}.0.{name}") for name in names)
    return next((one for one in found if one is not scheme), scheme)
