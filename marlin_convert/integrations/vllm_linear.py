"""The linears of vLLM over the tensors of MARLIN files: fused, split over ranks, on a GPU or a CPU.

Both layouts pack 64 outputs at a time, in columns one after another: linears that vLLM fuses are their
tensors side by side, and a rank's outputs are a run of columns. A rank's inputs are a run of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from marlin_convert import formats
from marlin_convert.errors import FormatError, SourceError
from marlin_convert.formats.scheme import groups_of
from marlin_convert.kernels.dequantized import dequantize
from marlin_convert.kernels.matmul import check_scales, matmul

SCALES = "s"
# The classes of a layer's experts, by version.
EXPERTS = {"FusedMoE", "RoutedExperts"}


def linear_method(
    layer: nn.Module, prefix: str, scheme: formats.Scheme, fused: Mapping[str, Sequence[str]]
) -> QuantizeMethodBase | None:
    """The method of a linear or of experts, dense or packed as the config says; None for anything else.

    FormatError when what vLLM fuses is not stored in one way, and for experts that there is no kernel for.
    """
    if EXPERTS & {kind.__name__ for kind in type(layer).__mro__}:
        from marlin_convert.integrations.vllm_experts import MarlinExpertsMethod, stored_dense

        if stored_dense(scheme, prefix):
            return None
        return MarlinExpertsMethod(scheme, prefix, layer.moe_config)
    if not isinstance(layer, LinearBase):
        return None
    path, _, name = prefix.rpartition(".")
    parts = [f"{path}.{part}" for part in fused.get(name, [name])]
    fates = {part: None if scheme.skips(part) else scheme.of(part) for part in parts}
    first, *others = set(fates.values())
    if others:
        stored = ", ".join(f"{part} {fate.format if fate else 'dense'}" for part, fate in fates.items())
        raise FormatError(
            f"vLLM loads these as one, and they are not stored in one way: {stored}.",
            "convert the model again, all of them --skip or --unpruned, or none.",
        )
    return UnquantizedLinearMethod() if first is None else MarlinLinearMethod(first, prefix)


@register_weight_loader_v2_supported_method
class MarlinLinearMethod(LinearMethodBase):
    """A packed linear: our kernel on a GPU; elsewhere dequantized once, after loading."""

    def __init__(self, scheme: formats.Scheme, prefix: str):
        self.scheme = scheme
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Any,
        **others: Any,
    ) -> None:
        """Make the parameters that a rank's part of the layer is loaded into; FormatError if it has none."""
        k, n = input_size_per_partition, sum(output_partition_sizes)
        self._check(k, output_partition_sizes, input_size, output_size)
        self.dtype = params_dtype
        self.loaded: dict[str, set[Any]] = {suffix: set() for suffix in formats.suffixes(self.scheme)}
        self.groups = groups_of(input_size, self.scheme.group_size)
        for suffix, (dtype, shape) in formats.tensors(self.scheme, k, n).items():
            loader = self._noting(suffix, weight_loader)
            if suffix == SCALES:
                # vLLM does not say that a tensor is missing: these stay what no scale can be
                scales = {"data": torch.full(shape, torch.nan, dtype=dtype), "output_dim": 1}
                if self.groups == 1:  # every rank's, whichever inputs it has
                    parameter = ChannelQuantScaleParameter(**scales, weight_loader=loader)
                else:
                    parameter = GroupQuantScaleParameter(**scales, input_dim=0, weight_loader=loader)
            else:
                parameter = PackedvLLMParameter(
                    data=torch.empty(shape, dtype=dtype),
                    input_dim=0,
                    output_dim=1,
                    packed_dim=1,
                    packed_factor=Fraction(1, 2),  # both B and the metadata have two columns for an output
                    weight_loader=loader,
                )
            layer.register_parameter(suffix, parameter)

    def _noting(self, suffix: str, load: Callable[..., None]) -> Callable[..., None]:
        """A loader that notes which parts of a fused layer it has loaded: those of all tensors must agree."""

        def loader(parameter: Parameter, tensor: Tensor, *part: Any, **named: Any) -> None:
            load(parameter, tensor, *part, **named)
            self.loaded[suffix].add((*part, *named.values()))

        return loader

    def _check(self, k: int, outputs: Sequence[int], input_size: int, output_size: int) -> None:
        """FormatError when a rank's part of the layer is not a layer of this layout."""
        bits, size = self.scheme.bits, self.scheme.group_size
        for n in outputs:
            reason = formats.FORMATS[self.scheme.format].refusal(k, n, bits=bits, group_size=size)
            if reason:
                raise FormatError(
                    f"{self.prefix} has {input_size} inputs and {output_size} outputs, of which a rank gets "
                    f"{k} and {n}: {self.scheme.format} {reason}.",
                    "serve it with a smaller --tensor-parallel-size.",
                )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave what `apply` needs; SourceError when a tensor was not in the files."""
        tensors = {suffix: getattr(layer, suffix).data for suffix in formats.suffixes(self.scheme)}
        scales = tensors[SCALES]
        parts = set().union(*self.loaded.values())
        missing = [suffix for suffix, loaded in self.loaded.items() if loaded != parts]
        if missing or bool(scales.isnan().any()):
            raise SourceError(
                f"{self.prefix}: {' and '.join(missing) or SCALES} is missing in the checkpoint.",
                "fetch it again.",
            )
        check_scales(scales, self.prefix)
        if self.groups > len(scales) == 1:
            tensors[SCALES] = formats.FORMATS[self.scheme.format].only_group(scales)
        for suffix in tensors:
            delattr(layer, suffix)
        if not scales.is_cuda:
            tensors = {"weight": dequantize(self.scheme, tensors, self.dtype, scales.device)}
        self.keep(layer, tensors)

    def keep(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Make these the parameters of a layer: the weight, or the tensors of the layout."""
        for name, tensor in tensors.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        if "weight" not in tensors:
            # vLLM's LoRA asks for the device of a layer's weights by one of the names that it knows
            layer.qweight = getattr(layer, next(iter(tensors)))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., k) times the weights, plus bias."""
        if hasattr(layer, "weight"):
            return nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]
        if self.scheme.format == "marlin-24":
            return matmul(x, layer.B_24, layer.s, bias, layer.B_meta)  # type: ignore[arg-type]
        return matmul(x, layer.B, layer.s, bias)  # type: ignore[arg-type]
