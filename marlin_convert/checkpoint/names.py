"""Names on disk and the parameters they mean: files of the base model alone, files saved inside a wrapper."""

from collections.abc import Mapping

from marlin_convert.errors import SourceError

# What torch.compile, DDP and FSDP put into the name of every parameter of the module they wrap.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The parts of the base model: files of it alone, which transformers reads too, leave the prefix out.
_PREFIX = "model."
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parameter(name: str) -> str:
    """The parameter that a tensor of this name is, by its full name in the causal language model."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[0] == "transformer" and parts[1:2] != [] and parts[1] in _PARTS:
        parts[0] = "model"
    name = ".".join(parts)
    while name.startswith((_PREFIX * 2, _PREFIX + "lm_head.")):
        name = name.removeprefix(_PREFIX)
    return _PREFIX + name if parts[0] in _PARTS else name


def parameters(names: Mapping[str, object], *, tied: bool) -> dict[str, str]:
    """The name on disk of every parameter, in the order of the names; SourceError when two are one parameter.

    `tied` says that the head is the embedding: then the files may have it under the head's name alone.
    """
    found: dict[str, str] = {}
    for name in names:
        full = parameter(name)
        if full in found:
            raise SourceError(
                f"{found[full]} and {name} are both {full}.",
                "remove the one that does not count, and save the model again.",
            )
        found[full] = name
    if tied and _HEAD in found and EMBEDDING not in found:
        return {EMBEDDING if full == _HEAD else full: name for full, name in found.items()}
    return found


def is_wrapped(name: str) -> bool:
    """Whether no engine knows a tensor of this name: it was saved inside a wrapper."""
    return any(part in _WRAPPERS for part in name.split(".")) or name.startswith("transformer.")
