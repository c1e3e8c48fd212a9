"""Quantize with llm-compressor (GPTQ, W4A16, symmetric) and say what it cost.

Run by the Python of `environments.sh llmc`. `default` is the library's own default (static activation order,
min-max scales); `best` adds the scale search it ships but leaves off.
"""

import argparse

import measure


def quantize(chosen: argparse.Namespace) -> None:
    """Quantize chosen.model into chosen.out."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(chosen.threads)
    ids = load_file(chosen.tokens)["input_ids"]
    samples, length = ids.shape
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    observer = {"weight_observer": "memoryless_mse"} if chosen.setting == "best" else {}
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=chosen.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(
            {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        ),
        recipe=[GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **observer)],
        max_seq_length=length,
        num_calibration_samples=samples,
        shuffle_calibration_samples=False,
        batch_size=chosen.batch_size,
    )
    model.save_pretrained(chosen.out, save_compressed=True)
    tokenizer.save_pretrained(chosen.out)


if __name__ == "__main__":
    # Batches of 1, its default, were no slower on a CPU than larger ones and took less memory.
    chosen = measure.arguments(__doc__, batch_size=1, settings=("default", "best"))
    quantize(chosen)
    measure.report("llm-compressor", "llmcompressor", chosen.setting)
