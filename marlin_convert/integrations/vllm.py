"""quant_method marlin and marlin_24 in vLLM, and AutoGPTQ's and vLLM's older names for the same layouts.

Every process of the engine imports this when it starts: what linears need is imported with the first of them.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from marlin_convert import formats
from marlin_convert.errors import FormatError


class MarlinConfig(QuantizationConfig):
    """The quantization_config of a checkpoint in the marlin layout; the workers get it pickled."""

    method = "marlin"
    format = "marlin"

    def __init__(self, scheme: formats.Scheme):
        super().__init__()
        self.scheme = scheme

    @classmethod
    def get_name(cls) -> str:
        """The quant_method."""
        return cls.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The types of activations that the kernel multiplies."""
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """That of the oldest GPUs there is a kernel for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where AutoGPTQ puts what is not in config.json."""
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MarlinConfig":
        """FormatError for what the layout does not hold."""
        return cls(formats.detect(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **others: Any
    ) -> str | None:
        """Our name for a config that means this layout under its own tensor names, whatever it calls it."""
        try:
            scheme = formats.detect(hf_quant_cfg)
        except FormatError:
            return None  # from_config says it, should the config be ours
        return cls.method if scheme.format == cls.format and not scheme.names else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that the config says for those that vLLM gives the same modules."""
        skipped, unpruned = (
            hf_to_vllm_mapper.apply_list(list(names)) for names in (self.scheme.skipped, self.scheme.unpruned)
        )
        self.scheme = replace(self.scheme, skipped=tuple(skipped), unpruned=frozenset(unpruned))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What creates and multiplies the weights of a linear; None for anything else, the head included."""
        from marlin_convert.integrations.vllm_linear import linear_method

        return linear_method(layer, prefix, self.scheme, self.packed_modules_mapping)


class Marlin24Config(MarlinConfig):
    """The quantization_config of a checkpoint in the marlin-24 layout."""

    method = "marlin_24"
    format = "marlin-24"


def register() -> None:
    """Tell vLLM the two configs; more than once does no harm."""
    for config in (MarlinConfig, Marlin24Config):
        register_quantization_config(config.method)(config)
