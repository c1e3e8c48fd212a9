"""Quantize with auto-round (W4A16, symmetric) and say what it cost.

Run by the Python of `environments.sh autoround`. `default` is the library's own default, 200 steps a block;
`best` is its preset of that name, 1000 steps. Both on the tokens that everybody has. The underscore that ends
this file's name keeps it from being imported in the library's place.
"""

import argparse

import measure

STEPS = {"default": 200, "best": 1000}


def quantize(chosen: argparse.Namespace) -> None:
    """Quantize chosen.model into chosen.out."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(chosen.threads)
    ids = load_file(chosen.tokens)["input_ids"]
    samples, length = ids.shape
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto"),
        AutoTokenizer.from_pretrained(chosen.model),
        scheme="W4A16",
        group_size=chosen.group_size,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
        iters=STEPS[chosen.setting],
        nsamples=samples,
        seqlen=length,
        batch_size=chosen.batch_size,
        device_map=chosen.device,
    )
    rounding.quantize_and_save(str(chosen.out), format="auto_gptq")
    (made,) = chosen.out.iterdir()  # a directory that it names after the model
    for file in made.iterdir():
        file.rename(chosen.out / file.name)
    made.rmdir()


if __name__ == "__main__":
    # Batches of 8 are its default.
    chosen = measure.arguments(__doc__, batch_size=8, settings=tuple(STEPS))
    quantize(chosen)
    measure.report("auto-round", "auto_round", chosen.setting)
