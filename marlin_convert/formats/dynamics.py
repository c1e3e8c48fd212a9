"""GPTQModel's `dynamic`: what a config says of layers that are stored otherwise than the rest."""

from collections.abc import Callable, Mapping
from typing import Any

from marlin_convert.errors import FormatError
from marlin_convert.formats import mixtures
from marlin_convert.formats.scheme import Scheme, mapping_of, pattern_of

# What GPTQModel's overrides by layer say of how the layer is stored; the rest is of how it was solved.
_STORED = {"bits", "group_size", "sym", "desc_act"}
_NOT_STORED_HERE = ("rotation", "adapter", "pack_dtype", "format", "checkpoint_format")


def overrides(found: Mapping[str, mixtures.Kind], usual: mixtures.Kind) -> dict[str, dict[str, Any]]:
    """The part of `dynamic` that names what is stored otherwise than most."""
    return {
        f"+:{mixtures.pattern(name)}": {"bits": bits, "group_size": group_size}
        for (bits, group_size), names in mixtures.told(found).items()
        if (bits, group_size) != usual
        for name in names
    }


def by_layer(
    config: Mapping[str, Any], scheme: Scheme, read: Callable[[Mapping[str, Any]], Scheme]
) -> tuple[tuple[str, ...], tuple[tuple[str, Scheme], ...]]:
    """Patterns of the modules left dense, and those stored otherwise than the rest, with how.

    `read` gives the scheme of a config without `dynamic`, where these stand. FormatError for an override that
    makes another layout of a layer.
    """
    skipped, overrides = [], []
    for key in mapping_of(config, "dynamic"):
        pattern, said = key.removeprefix("-:").removeprefix("+:"), mapping_of(config["dynamic"], key)
        if key.startswith("-:"):
            skipped.append(pattern)
            continue
        unknown = [name for name in _NOT_STORED_HERE if said.get(name) not in (None, config.get(name))]
        if unknown:
            raise FormatError(
                f"quantization_config: dynamic override {key!r} with {unknown[0]} is not supported"
            )
        stored = {name: value for name, value in said.items() if name in _STORED}
        other = read({**config, **stored, "dynamic": None})
        # the first pattern that matches counts, also where it changes nothing
        overrides.append((pattern_of(pattern), other))
    if all(other == scheme for _, other in overrides):
        overrides = []
    return tuple(skipped), tuple(overrides)
