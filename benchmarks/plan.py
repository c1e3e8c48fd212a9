"""A plan of 60,000 matrices, as the largest mixtures of experts have: seconds of every step.

No model of that size is built: the linears are 60,000 of torch's, without memory. The time to beat is two
seconds for all of it.
"""

import time

import torch
from torch import nn

from marlin_convert import recipe
from marlin_convert.fates import fates_of
from marlin_convert.formats import FORMATS, detect
from marlin_convert.matrix import by_name, fate_of
from marlin_convert.plan import _tensors
from marlin_convert.refusals import check_patterns, check_shapes, check_stages

BLOCKS, EXPERTS = 60, 333


class Stored:
    """The weights of a source in bfloat16, nothing of which is packed."""

    scheme = None

    def is_packed(self, linear: str) -> bool:
        """No."""
        return False

    def dtype(self, name: str) -> torch.dtype:
        """The type of every weight."""
        return torch.bfloat16


def timed(what: str, call):
    """The result of a call, and how long it took, printed."""
    started = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - started
    print(f"{what:48} {seconds:6.2f} s", flush=True)
    return found, seconds


def main() -> None:
    """Time every step."""
    shapes = {"gate_proj": (2048, 768), "up_proj": (2048, 768), "down_proj": (768, 2048)}
    with torch.device("meta"):
        kinds = {path: nn.Linear(k, n, bias=False) for path, (k, n) in shapes.items()}
    linears = {
        f"model.layers.{block}.mlp.experts.{expert}.{path}": kinds[path]
        for block in range(BLOCKS)
        for expert in range(EXPERTS)
        for path in shapes
    }
    stage = {name: (name,) for name in linears}
    chosen = recipe.Recipe(
        format="compressed-tensors", overrides={"model.layers.0.*": {"bits": 8, "group_size": 64}}
    )
    print(f"{len(linears)} matrices")
    fates, first = timed("fates", lambda: fates_of(linears, {}, chosen, Stored(), set(), repack=False))

    def refuse() -> None:
        check_patterns(chosen, list(linears))
        check_stages(fates, stage, repack=False)
        check_shapes(fates, chosen, stage)

    _, second = timed("refusals", refuse)
    _, third = timed("tensors", lambda: {name: _tensors(fate) for name, fate in fates.items()})
    config, fourth = timed(
        "config", lambda: FORMATS["compressed-tensors"].quantization_config(list(fates.values()))
    )
    print(f"{'the plan':48} {first + second + third + fourth:6.2f} s")

    rows, _ = timed("manifest written", lambda: [fate.row() for fate in fates.values()])
    again, _ = timed("manifest read", lambda: by_name(fate_of(row) for row in rows))
    assert again == fates
    scheme = detect(config)
    found, _ = timed("every matrix looked up in the config", lambda: [scheme.of(name) for name in fates])
    for one, fate in zip(found, fates.values(), strict=True):
        assert (one.bits, one.group_size) == (fate.layout.bits, fate.layout.group_size), fate.name


main()
