"""The weights of a checkpoint as floats, or as integer codes where they are quantized."""

import torch
from torch import Tensor

from marlin_convert import formats
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import SourceError
from marlin_convert.quantized import QuantizedLinear


class Weights:
    """Every parameter of a checkpoint, dense or packed, under its dense name."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        config = checkpoint.quantization_config
        self.scheme = formats.detect(config) if config else None
        self._suffixes = formats.suffixes(self.scheme) if self.scheme else ()

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors or self.is_packed(name.removesuffix(".weight"))

    def is_packed(self, linear: str) -> bool:
        """Whether this linear is stored as integer codes."""
        return bool(self._suffixes) and f"{linear}.{self._suffixes[0]}" in self.checkpoint.tensors

    def packed_names(self) -> set[str]:
        """The names of all tensors that make packed linears."""
        return {
            name
            for name in self.checkpoint.tensors
            if name.rpartition(".")[2] in self._suffixes and self.is_packed(name.rpartition(".")[0])
        }

    def _packed_tensors(self, linear: str, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
        return {
            suffix: self.checkpoint.read(f"{linear}.{suffix}")
            for suffix in self._suffixes
            if f"{linear}.{suffix}" in self.checkpoint.tensors and suffix not in but
        }

    def quantized(self, linear: str) -> QuantizedLinear:
        """The codes and scales of a packed linear, without its bias; FormatError if they make no sense."""
        assert self.scheme is not None
        return formats.FORMATS[self.scheme.format].unpack(self._packed_tensors(linear), self.scheme)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter as it is computed with: what is packed counts as the model's own type."""
        if name in self.checkpoint.tensors:
            return self.checkpoint.tensors[name].dtype
        config = self.checkpoint.config
        return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))

    def read(self, name: str) -> Tensor:
        """A parameter as floats: as stored, or dequantized to float32."""
        if name in self.checkpoint.tensors:
            return self.checkpoint.read(name)
        linear = name.removesuffix(".weight")
        if not self.is_packed(linear):
            raise SourceError(f"{name} is not in {self.checkpoint.directory.name}.")
        return self.quantized(linear).dequantize(torch.float32)
