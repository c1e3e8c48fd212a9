"""What we know of model families, as data: where the decoder blocks are and in which stages they work."""

from collections.abc import Iterable
from dataclasses import dataclass

from marlin_convert.errors import SourceError

Stage = tuple[str, ...]

# Linears of one stage read the same input; stages run in this order.
SPLIT: tuple[Stage, ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FUSED: tuple[Stage, ...] = (
    ("self_attn.qkv_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj",),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Architecture:
    """One model family: `blocks` is the module path of its decoder blocks, `stages` the linears of a block.

    Engines fuse the linears of a stage into one matrix, so a stage is quantized as a whole or not at all.
    """

    stages: tuple[Stage, ...]
    blocks: str = "model.layers"

    def stage_of(self, linear: str) -> Stage | None:
        """The stage a linear of a block belongs to, None if the family's table does not name it."""
        return next((stage for stage in self.stages if linear in stage), None)


ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": Architecture(SPLIT),
    "gemma3_text": Architecture(SPLIT),
    "granite": Architecture(SPLIT),
    "llama": Architecture(SPLIT),
    "mistral": Architecture(SPLIT),
    "olmo2": Architecture(SPLIT),
    "phi3": Architecture(FUSED),
    "qwen2": Architecture(SPLIT),
    "qwen3": Architecture(SPLIT),
    "smollm3": Architecture(SPLIT),
}


def architecture_of(config: dict) -> Architecture:
    """The table row for a config.json; SourceError names an unknown family or a mixture of experts."""
    model_type = config.get("model_type")
    experts = next((key for key in _EXPERT_KEYS if config.get(key)), None)
    if experts or "moe" in str(model_type):
        count = f" ({experts} = {config[experts]})" if experts else ""
        raise SourceError(
            f"{model_type!r} is a mixture of experts{count}, which is not supported yet.",
            "Dense models of these families are: " + _known(),
        )
    if model_type not in ARCHITECTURES:
        raise SourceError(f"{model_type!r} is not a known architecture.", "Known are: " + _known())
    return ARCHITECTURES[model_type]


_EXPERT_KEYS: Iterable[str] = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _known() -> str:
    return ", ".join(sorted(ARCHITECTURES)) + "."
