"""Greedy answers of vLLM's offline engine, or answers that it is given, with the logprob of every token.

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
    answers = request.get("answers", [])
    if answers:
        given = [{"prompt_token_ids": one["prompt"] + one["tokens"]} for one in answers]
        scored = llm.generate(given, SamplingParams(max_tokens=1, prompt_logprobs=0))
        for answer, whole in zip(answers, scored, strict=True):
            at = whole.prompt_logprobs[len(answer["prompt"]) :]
            answer["logprobs"] = [one[token].logprob for token, one in zip(answer["tokens"], at, strict=True)]
    else:
        greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], logprobs=0, ignore_eos=True)
        for answer in llm.generate(request["prompts"], greedy):
            [chosen] = answer.outputs
            tokens = list(chosen.token_ids)
            logprobs = [at[token].logprob for token, at in zip(tokens, chosen.logprobs, strict=True)]
            answers.append({"prompt": answer.prompt_token_ids, "tokens": tokens, "logprobs": logprobs})
    Path(out).write_text(json.dumps(answers))
