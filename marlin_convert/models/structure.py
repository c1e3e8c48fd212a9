"""What a model is made of for us: its blocks, the stages they work in, and what stays dense."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

# The linears of a block, by their paths inside it, that read one input: engines fuse them into one matrix.
Stage = tuple[str, ...]


@dataclass(frozen=True)
class Residual:
    """The sum that a linear's output goes into, and nowhere else: residual + multiplier * output.

    `module` is the path inside the block of what reads the residual earlier, in Llama a norm: it is the first
    tensor that it is handed. `norm` is that of the norm that the output goes through on its way to the sum,
    as in Gemma 2 and OLMo 2; "" where there is none.
    """

    module: str
    multiplier: float = 1.0
    norm: str = ""


@dataclass(frozen=True)
class Part:
    """A submodule of a block whose last operation is its last linear; stages run in order.

    `pair` says that the submodule returns (output, attention weights) and not the output alone. Stages that
    no submodule ends with make a part whose `module` is "". `residual` is what the output is added to; it is
    None where more than a norm stands between.

    `experts` says that the module is one of so many experts, and `choices` to how many of them an input goes:
    two stages for each.
    """

    module: str
    stages: tuple[Stage, ...]
    pair: bool = False
    residual: Residual | None = None
    experts: int = 0
    choices: int = 0

    @property
    def last(self) -> Stage:
        """The stage whose output is the submodule's."""
        return self.stages[-1]


@dataclass(frozen=True)
class Structure:
    """`blocks` is the module path of the list of decoder blocks, `parts` what each of them runs in order.

    `dense` has every linear that is never quantized, by its path in the model, and why; `returns` of every
    block how many values it returns as a tuple, 0 for a tensor alone; `batch_axis` is that of the hidden
    states; `handed` says which arguments of a block, by place or name, are further values that the one before
    returned, by their places; `idle` are the parameters and buffers outside of the blocks that a text never
    reads.
    """

    blocks: str
    parts: tuple[tuple[Part, ...], ...]
    dense: Mapping[str, str]
    returns: tuple[int, ...]
    batch_axis: int
    handed: Mapping[int | str, int]
    idle: frozenset[str]

    def stages(self, block: int) -> tuple[Stage, ...]:
        """The stages of a block in the order they run."""
        return tuple(stage for part in self.parts[block] for stage in part.stages)

    def stage_of(self, linear: str) -> Stage | None:
        """The stage that a linear (by its path in the model) works in, None if it stays dense."""
        return self._stages.get(linear)

    def together(self, linear: str) -> tuple[str, ...]:
        """The linears that engines load as one with a linear, itself among them: a stage, or all experts."""
        return self._together.get(linear, (linear,))

    @cached_property
    def experts(self) -> dict[str, int]:
        """How many experts every module of experts has, by its path in the model."""
        return {
            f"{self.blocks}.{number}.{part.module}": part.experts
            for number, parts in enumerate(self.parts)
            for part in parts
            if part.experts
        }

    def part_of_experts(self, linear: str) -> Part | None:
        """The part of the experts that a linear is one's of, if it is."""
        return self._parts_of_experts.get(linear)

    @cached_property
    def _parts_of_experts(self) -> dict[str, Part]:
        return {
            f"{self.blocks}.{number}.{linear}": part
            for number, parts in enumerate(self.parts)
            for part in parts
            if part.experts
            for stage in part.stages
            for linear in stage
        }

    def block_of(self, name: str) -> int | None:
        """The number of the block that a module or tensor is inside of, None if it is in no block."""
        number, _, rest = name.removeprefix(f"{self.blocks}.").partition(".")
        inside = name.startswith(f"{self.blocks}.") and bool(rest) and number.isdecimal()
        return int(number) if inside and int(number) < len(self.parts) else None

    @cached_property
    def _together(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for number, parts in enumerate(self.parts):
            for part in parts:
                all_experts = [tuple(name for stage in part.stages for name in stage)]
                for stage in all_experts if part.experts else part.stages:
                    names = tuple(f"{self.blocks}.{number}.{name}" for name in stage)
                    found |= dict.fromkeys(names, names)
        return found

    @cached_property
    def _stages(self) -> dict[str, Stage]:
        return {
            f"{self.blocks}.{number}.{linear}": stage
            for number in range(len(self.parts))
            for stage in self.stages(number)
            for linear in stage
        }
