"""What we know of model families, as data: the parts of a decoder block and the stages they work in."""

from dataclasses import dataclass

from marlin_convert.errors import SourceError

Stage = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A submodule of a block whose last operation is its last linear.

    The linears of a stage read one input, and engines fuse them into one matrix; stages run in order.
    `pair` says that the submodule returns (output, attention weights) and not the output alone.
    """

    module: str
    stages: tuple[Stage, ...]
    pair: bool = False

    @property
    def last(self) -> Stage:
        """The stage whose output is the submodule's."""
        return self.stages[-1]


@dataclass(frozen=True)
class Architecture:
    """A model family: `blocks` is the module path of its decoder blocks, `parts` what a block runs in order.

    `attention` is the implementation that transformers computes it with; torch's fused one has no softcap.
    """

    parts: tuple[Part, ...]
    blocks: str = "model.layers"
    attention: str = "sdpa"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a block in the order they run."""
        return tuple(stage for part in self.parts for stage in part.stages)

    def stage_of(self, linear: str) -> Stage | None:
        """The stage a linear of a block belongs to, None if the family's table does not name it."""
        return next((stage for stage in self.stages if linear in stage), None)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SPLIT = (
    Part("self_attn", (_QKV, ("self_attn.o_proj",)), pair=True),
    Part("mlp", (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))),
)
FUSED = (
    Part("self_attn", (("self_attn.qkv_proj",), ("self_attn.o_proj",)), pair=True),
    Part("mlp", (("mlp.gate_up_proj",), ("mlp.down_proj",))),
)

ARCHITECTURES = {
    "gemma2": Architecture(SPLIT, attention="eager"),
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

_MORE_THAN_TEXT = ("text_config", "vision_config", "audio_config")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def architecture_of(config: dict) -> Architecture:
    """The table row for a config.json; SourceError names an unknown family or form."""
    model_type = config.get("model_type")
    known = ", ".join(ARCHITECTURES)
    experts = next((key for key in _EXPERT_COUNTS if config.get(key)), None)
    if experts or "moe" in str(model_type):
        count = f" ({experts} = {config[experts]})" if experts else ""
        raise SourceError(
            f"{model_type!r} is a mixture of experts{count}; those are not supported yet.",
            f"dense models of these families are: {known}.",
        )
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    others = ", ".join(key for key in _MORE_THAN_TEXT if config.get(key))
    if others:
        raise SourceError(
            f"{model_type!r} is the multimodal form of a model: config.json has {others}.",
            f"save its text part as a model of its own with transformers; known are: {known}.",
        )
    raise SourceError(f"{model_type!r} is not a known architecture.", f"known are: {known}.")
