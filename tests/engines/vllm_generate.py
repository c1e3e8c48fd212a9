"""Greedy answers of vLLM's offline engine, with the logprob of every token.

usage: vllm_generate.py CHECKPOINT REQUEST.json OUT.json     (run by the Python of `environments.sh vllm`)
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

# the engine is a process that starts by importing this file again
if __name__ == "__main__":
    checkpoint, request, out = sys.argv[1:]
    request = json.loads(Path(request).read_text())
    llm = LLM(checkpoint, **{"dtype": "float16"} | request["options"])
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], logprobs=0, ignore_eos=True)
    answers = []
    for answer in llm.generate(request["prompts"], greedy):
        [chosen] = answer.outputs
        logprobs = [at[token].logprob for token, at in zip(chosen.token_ids, chosen.logprobs, strict=True)]
        answers.append(
            {"prompt": answer.prompt_token_ids, "tokens": list(chosen.token_ids), "logprobs": logprobs}
        )
    Path(out).write_text(json.dumps(answers))
