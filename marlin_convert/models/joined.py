"""Linears of transformers' that files and engines have as several: taken apart as the files have them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter

from marlin_convert.models.experts import converters_of, plain

WEIGHT = ".weight"


class Joined(nn.Module):
    """Stands where one linear was: the outputs of those it is made of, which are its neighbours, as one."""

    parts: tuple[nn.Module, ...]

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.__dict__["parts"] = tuple(parts)  # no children: they are those of the module around

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for x (..., k), (..., n)."""
        return torch.cat([part(x) for part in self.parts], -1)


def take_apart(model: PreTrainedModel) -> None:
    """Put linears as files have them beside each that transformers makes of several, on the meta device."""
    for converter in filter(joins_linears, converters_of(model)):
        (whole,) = (name.removesuffix(WEIGHT) for name in plain(converter.target_patterns))
        names = [name.removesuffix(WEIGHT).rpartition(".")[2] for name in plain(converter.source_patterns)]
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and f".{path}".endswith(f".{whole}"):
                around, _, name = path.rpartition(".")
                parent = model.get_submodule(around)
                n, bias = module.out_features // len(names), module.bias is not None
                for part in names:
                    parent.add_module(part, nn.Linear(module.in_features, n, bias=bias, device="meta"))
                parent.add_module(name, Joined([parent.get_submodule(part) for part in names]))


def joins_linears(converter: WeightConverter) -> bool:
    """Whether a converter puts the outputs of linears side by side that files have one by one."""
    (operation, *others), patterns = converter.operations, converter.source_patterns
    return (
        isinstance(operation, Concatenate)
        and not others
        and operation.dim == 0
        and all(pattern.endswith(f"_proj{WEIGHT}") for pattern in (*patterns, *converter.target_patterns))
    )
