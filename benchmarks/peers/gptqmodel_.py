"""Quantize with GPTQModel (GPTQ, 4 bits, symmetric) and say what it cost.

Run by the Python of `environments.sh gptqm`. `default` is the library's own default (group-aware activation
order, min-max scales); `best` adds the scale search it ships but leaves off; `gptaq` and `foem` add to that
what they do against the drift of the inputs, with their own defaults. The underscore that ends this file's
name keeps it from being imported in the library's place.
"""

import argparse
import os
import sys
from pathlib import Path

import measure


def quantize(chosen: argparse.Namespace) -> None:
    """Quantize chosen.model into chosen.out."""
    # Its loader asks for two workers and stops on a machine where its own default is one.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, chosen.threads))
    # The packer that environments.sh compiled.
    os.environ["GPTQMODEL_TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    torch.set_num_threads(chosen.threads)
    ids = load_file(chosen.tokens)["input_ids"]
    more: dict[str, object] = {} if chosen.setting == "default" else {"mse": 2.0}
    more |= {chosen.setting: {}} if chosen.setting in ("gptaq", "foem") else {}
    config = QuantizeConfig(bits=4, group_size=chosen.group_size, sym=True, **more)
    model = GPTQModel.load(chosen.model, config, device=chosen.device)
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(calibration, batch_size=chosen.batch_size)
    model.save(str(chosen.out))


if __name__ == "__main__":
    # Batches of 8 were up to a fifth faster on a CPU than its default of 1.
    chosen = measure.arguments(__doc__, batch_size=8, settings=("default", "best", "gptaq", "foem"))
    quantize(chosen)
    measure.report("GPTQModel", "gptqmodel", chosen.setting)
