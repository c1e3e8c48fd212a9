"""What transformers takes the tensors of a checkpoint for: which parameter each is, and which are left out.

Vision-language models have had two sets of names, `language_model.model.layers.0` and
`model.language_model.layers.0`. What leads from the old to the new is transformers' own, class by class.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key

from marlin_convert.checkpoint.linears import Stacked, Weights
from marlin_convert.models.experts import Experts, merges_experts
from marlin_convert.models.joined import Joined, joins_linears

# Layers for multi-token prediction, by name, and how many blocks past the last one they are.
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")

_NUMBER = re.compile(r"\.(\d+)\.")

# A tensor of one expert, and what stands around the experts.
_OF_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(weight|bias)")


class Names:
    """Which parameter of a model a tensor is by its name."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        transforms = get_model_conversion_mapping(model)
        modules = dict(model.named_modules())
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        apart = any(isinstance(module, Joined) for module in modules.values())
        self._stacks = {
            stack.path: stack
            for module in modules.values()
            if isinstance(module, Experts)
            for stack in module.stacks
        }
        # what was taken apart is as it is in files that have it so
        self._converters = [
            one
            for one in transforms
            if isinstance(one, WeightConverter)
            and not (self._stacks and merges_experts(one))
            and not (apart and joins_linears(one))
        ]
        self._prefix = model.base_model_prefix
        self._expected = model.state_dict()
        self._linears = {
            f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)
        }
        self._left = "|".join(f"({one})" for one in sorted(model._keys_to_ignore_on_load_unexpected or ()))
        config = model.config.get_text_config()
        blocks = getattr(config, "num_hidden_layers", 0)
        further = max(getattr(config, key, None) or 0 for key in _MTP_COUNTS)
        self._further = range(blocks, blocks + further)
        last = f".{blocks - 1}."
        self._lists = {name.partition(last)[0] for name in self._expected if last in name}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the model has, by its name."""
        return {name: tuple(tensor.shape) for name, tensor in self._expected.items()}

    def place(self, weights: Weights) -> None:
        """Let the tensors of a checkpoint be known by the names of the model's parameters."""
        weights.split(self.stacked)
        weights.rename(self.parameter)
        for name, (parts, dim) in self._joined(weights.checkpoint.tensors).items():
            weights.join(name, parts, dim)

    def parameter(self, name: str) -> str | None:
        """The parameter that transformers loads a tensor as, None if it loads it as none or converts it."""
        found, converted = self._renamed(name)
        if found in self._expected and not converted:
            return found
        if one := _OF_EXPERT.fullmatch(name):  # as `stacked` is divided where the files know no experts
            around, number, role, suffix = one.groups()
            stack = self.stacked(f"{around}.{role}.{suffix}")
            if stack is not None and role in stack.roles:
                return f"{stack.path.rpartition('.')[0]}.{number}.{role}.{suffix}"
        return None

    def _joined(self, tensors: Iterable[str]) -> dict[str, tuple[list[str], int]]:
        """The parameters that transformers joins several tensors to, along which dimension.

        No linears: of these engines know the parts.
        """
        found: dict[str, dict[str, str]] = {}
        for name in tensors:
            whole, pattern = self._renamed(name)
            if pattern is not None and whole in self._expected and whole not in self._linears:
                found.setdefault(whole, {})[pattern] = name
        joined = {}
        for whole, parts in found.items():
            for converter in self._converters:
                (operation, *others), wanted = converter.operations, list(converter.source_patterns)
                if isinstance(operation, Concatenate) and not others and set(parts) == set(wanted):
                    joined[whole] = ([parts[pattern] for pattern in wanted], operation.dim)
        return joined

    def stacked(self, name: str) -> Stacked | None:
        """The weight of all experts that a tensor is, if it is one."""
        path, pattern = self._renamed(name)
        stack = self._stacks.get(path)
        role = name.removesuffix(".weight").rpartition(".")[2]
        if stack is None or pattern is None or role not in stack.roles:
            return stack
        # one of those that transformers puts side by side
        n, *k = stack.shape
        return replace(stack, roles=(role,), shape=(n // len(stack.roles), *k), interleaved=False)

    def loaded_as(self, name: str) -> str:
        """What transformers calls a tensor, or the first parameter that it makes of it."""
        return self._renamed(name)[0]

    def is_converted(self, name: str) -> bool:
        """Whether transformers splits, joins or turns a tensor of the model while it loads it."""
        return self._renamed(name)[1] is not None and not self.is_beside(name)

    def beside(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are of the model's, but of no part that is built."""
        return [name for name in names if self.is_beside(name)]

    def is_beside(self, name: str) -> bool:
        """Whether a tensor belongs to the model, but to no part that is built: it goes along as it is.

        Layers for multi-token prediction, which engines draft with, and what else transformers says that it
        leaves out of this class.
        """
        if f"{name.rpartition('.')[0]}.weight" in self._expected:
            return False  # of a linear, packed as it may be
        name = self._renamed(name)[0]
        if name in self._expected:
            return False
        number = _NUMBER.search(name)
        if number and int(number[1]) in self._further and name[: number.start()] in self._lists:
            return True
        return bool(_MTP.search(name) or (self._left and re.search(self._left, name)))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """What transformers calls a tensor, and the pattern by which it converts it, if it does."""
        if name in self._expected:
            return name, None
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._expected)
