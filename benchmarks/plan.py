"""The plan of a model of DeepSeek-V3's shape, 45,000 matrices in 61 blocks: seconds of every step.

Only its headers are written: the files have holes in place of 1.3 TB of weights. The time to reach is eight
seconds for the plan.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from marlin_convert import recipe
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.formats import detect
from marlin_convert.matrix import by_name, fate_of
from marlin_convert.plan import make_plan

FILE = 4_300_000_000  # bytes of a file, as the Hub has them
T = TypeVar("T")


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a model's files, an expert's one by one."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        around, stack, role = name.partition(".experts.")
        if not stack:
            yield name, tuple(tensor.shape)
            continue
        count, n, k = tensor.shape
        roles = {"gate_proj": n // 2, "up_proj": n // 2} if role == "gate_up_proj" else {role: n}
        for number in range(count):
            for one, rows in roles.items():
                yield f"{around}.experts.{number}.{one}.weight", (rows, k)


def write(config: Any, directory: Path) -> None:
    """A model in bfloat16: its config, its index, and files with headers and holes."""
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    files: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in tensors(config):
        size = 2 * math.prod(shape)
        if files[-1] and end + size > FILE:
            files.append({})
            end = 0
        files[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    index = {}
    for number, entries in enumerate(files):
        header, (*_, last) = json.dumps(entries).encode(), entries.values()
        with (directory / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + last["data_offsets"][1])
        index |= dict.fromkeys(entries, Path(file.name).name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def timed(what: str, call: Callable[[], T]) -> T:
    """The result of a call; how long it took is printed."""
    started = time.perf_counter()
    found = call()
    print(f"{what:48} {time.perf_counter() - started:6.2f} s", flush=True)
    return found


def main() -> None:
    """Time every step."""
    with tempfile.TemporaryDirectory() as place:
        write(transformers.DeepseekV3Config(), Path(place))
        checkpoint = timed("headers", lambda: Checkpoint.open(Path(place)))
        chosen = recipe.Recipe(
            format="compressed-tensors", overrides={"model.layers.0.*": {"bits": 8, "group_size": 64}}
        )
        plan = timed("the plan", lambda: make_plan(Weights(checkpoint), chosen))
    print(f"{len(plan.fates)} matrices, {len(plan.specs)} tensors of {plan.output_bytes / 1e9:.0f} GB")
    rows = timed("manifest written", lambda: [fate.row() for fate in plan.fates.values()])
    again = timed("manifest read", lambda: by_name(fate_of(row) for row in rows))
    assert again == plan.fates
    assert plan.quantization_config is not None
    scheme = detect(plan.quantization_config)
    found = timed(
        "every matrix looked up in the config", lambda: [scheme.of(fate.name) for fate in plan.packed]
    )
    for one, fate in zip(found, plan.packed, strict=True):
        assert (one.bits, one.group_size) == (fate.layout.bits, fate.layout.group_size), fate.name


if __name__ == "__main__":
    main()
