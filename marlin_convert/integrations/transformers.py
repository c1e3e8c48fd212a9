"""quant_method marlin and marlin_24 in transformers: from_pretrained, save_pretrained, generate.

Importing this puts the quantizer into transformers' table.

Packed linears become modules that hold the tensors as they are in the files, so that saving them writes the
same bytes. Which linears are packed is what the files say, as everywhere here: where a config says something
else, transformers would find no weights and go on with random ones.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin_convert import formats
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import SourceError
from marlin_convert.kernels.matmul import LINEARS, PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("marlin", "marlin_24")


class MarlinConfig(QuantizationConfigMixin):
    """The quantization_config of config.json, kept as it is; FormatError for what the layouts do not hold."""

    def __init__(self, **settings: Any):
        formats.detect(settings)
        self.__dict__.update(settings)


class MarlinQuantizer(HfQuantizer):
    """Puts packed linears into a model that is about to be loaded."""

    requires_calibration = True  # what is not quantized yet is `marlin-convert quantize`'s to do

    def __init__(self, config: MarlinConfig, **others: Any):
        super().__init__(config, **others)
        # experts in files whose place transformers calls otherwise, as theirs and ours
        self._places: dict[str, str] = {}

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **others: Any
    ) -> None:
        """Replace the linears that are packed in the files; SourceError if these are not of the model."""
        # there are no models yet where this file is imported
        from marlin_convert.integrations.transformers_experts import PackedExperts
        from marlin_convert.models.experts import experts_of, take_apart
        from marlin_convert.models.names import Names

        if not checkpoint_files:
            raise SourceError(
                "packed linears are loaded from a checkpoint's files, not from a state_dict.",
                "give from_pretrained the directory or the Hub id of the checkpoint.",
            )
        weights = Weights(Checkpoint.open(Path(checkpoint_files[0]).parent))
        if weights.disregarded:
            raise SourceError(f"{weights.disregarded}.", "take the quantization_config out of config.json.")
        # in the files they may have a prefix that this class has not, as one without a head, or older names
        if any(".experts." in name for name in weights.packed_linears()):
            take_apart(model)
        names = Names(model)
        names.place(weights)
        for path, experts in experts_of(model):
            first = f"{path}.0.{experts.roles[-1]}"
            if not weights.is_packed(first):
                raise SourceError(
                    f"the experts of {path} are dense in the files, and those of other layers packed: "
                    "transformers loads all of them in one way.",
                    "quantize again without --skip for some layers' experts, or serve it with vLLM as gptq.",
                )
            # transformers does not rename the experts of all types that are in files by another name
            codes = next(iter(weights.stored(first).values()))
            theirs, ours = (
                ".".join(name.split(".")[-5:-3]) for name in (names.loaded_as(weights.on_disk(codes)), codes)
            )
            if theirs != ours:
                self._places[theirs] = ours
        for name in weights.packed_linears():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, nn.Linear):
                raise SourceError(
                    f"{name} is packed in the files, and no linear of {type(model).__name__}.",
                    "load it with the class that config.json names under architectures.",
                )
            model.set_submodule(name, _packed(module, weights, name))
        for _, experts in experts_of(model):
            experts.__class__ = type("PackedExperts", (PackedExperts, type(experts)), {})
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:
        """Look at what was loaded: SourceError if it was split, KernelError for scales too large."""
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise SourceError(
                "packed linears cannot be split by transformers: tensor parallelism is not supported here.",
                "leave out tp_plan (device_map='auto' spreads the layers over GPUs), or serve it with vLLM's "
                "--tensor-parallel-size.",
            )
        self._cast_renamed(model)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.check_scales(name)
        return model

    def _cast_renamed(self, model: nn.Module) -> None:
        """Cast what is in the files by another name than the model's, as transformers 5.15 to 5.17 do not."""
        plan: Any = getattr(model, "_get_dtype_plan", None)
        if plan is None:
            return
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            other = parameter.is_floating_point() and parameter.dtype != wanted
            if other and not any(kept in name for kept in plan(wanted)):
                parameter.data = parameter.data.to(wanted)

    def get_weight_conversions(self) -> list[Any]:
        """What transformers is to call otherwise while it loads, beside what it does itself."""
        from transformers.core_model_loading import WeightRenaming

        return super().get_weight_conversions() + [
            WeightRenaming(rf"\.{re.escape(theirs)}\.", f".{ours}.") for theirs, ours in self._places.items()
        ]

    def is_serializable(self) -> bool:
        """Packed linears are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _packed(dense: nn.Linear, weights: Weights, name: str) -> nn.Module:
    """The module, without memory yet, for the tensors that are stored under this name."""
    k, n, scheme = dense.in_features, dense.out_features, weights.scheme_of(name)
    weights.check(name, k, n)
    tensors = [
        torch.empty(shape, dtype=dtype, device="meta")
        for dtype, shape in formats.tensors(scheme, k, n).values()
    ]
    bias = None if dense.bias is None else torch.empty(n, dtype=dense.bias.dtype, device="meta")
    return LINEARS[scheme.format](*tensors, bias)


# Here and not in a function: whoever imports this, or makes transformers load its table, has it registered.
for _method in METHODS:
    if _method not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_method)(MarlinConfig)
        register_quantizer(_method)(MarlinQuantizer)
