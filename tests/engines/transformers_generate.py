"""Greedy answers of transformers, with the logprob of every token.

usage: transformers_generate.py CHECKPOINT REQUEST.json OUT.json
       (run by the Python of `environments.sh transformers`, or of another one that has transformers)
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Compiling GPTQModel's layers costs more than everything else here.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig

if find_spec("marlin_convert"):
    import marlin_convert  # noqa: F401

checkpoint, request, out = sys.argv[1:]
request = json.loads(Path(request).read_text())
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
options = request["options"]
quantization = getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", {})
if quantization.get("quant_method") == "gptq":
    # what GPTQModel takes on a CPU by itself may compute in bfloat16, whatever the model's type
    options["quantization_config"] = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, **options)
answers = []
for prompt in request["prompts"]:
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=request["tokens"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    before = inputs.input_ids.shape[1]
    tokens = answer.sequences[0, before:]
    logprobs = torch.cat(answer.logits).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    answers.append(
        {"prompt": inputs.input_ids[0].tolist(), "tokens": tokens.tolist(), "logprobs": logprobs.tolist()}
    )
Path(out).write_text(json.dumps(answers))
