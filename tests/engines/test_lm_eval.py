"""lm-evaluation-harness runs what we write by the line in docs/generate.md, on local files (make engines)."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from engine_programs import ROOT, programs, run
from transformers import AutoTokenizer

pytestmark = pytest.mark.engines

TEXTS = ["def f(x):\n    return x + 1\n", "import os\n\nfor name in os.listdir('.'):\n    print(name)\n"]
TASK = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {texts}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def documented() -> list[str]:
    """The words of that line, from `python` on."""
    (line,) = re.findall(
        r"^python -c .*lm_eval.*$", (ROOT / "docs" / "generate.md").read_text("utf-8"), re.MULTILINE
    )
    return shlex.split(line)


def evaluate(words: list[str], model: Path, out: Path, **environment: str) -> tuple[int, str]:
    """Run these words, their model and task replaced: the exit status, and what was printed."""
    out.mkdir()
    texts = out / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (out / "texts.yaml").write_text(TASK.format(texts=texts))
    python, *others = words
    assert python == "python" and others[-2] == "--tasks"
    others[-1] = "texts"
    others = [re.sub(r"pretrained=[^,]+", f"pretrained={model}", word) for word in others]
    assert any(str(model) in word for word in others)
    more = ("--include_path", out, "--output_path", out / "results.json", "--device", "cpu")
    done = run(programs("lmeval") / "python", *others, *more, HF_HOME=str(out / "cache"), **environment)
    return done.returncode, done.stdout


def test_the_line_of_the_readme_measures_the_packed_model(quantized, plugin, reference, tmp_path):
    checkpoint = quantized("marlin")
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), reference(checkpoint)
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.inference_mode():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    words = documented()
    status, printed = evaluate(words, checkpoint, tmp_path / "with", **plugin)
    assert status == 0, printed[-4000:]
    (results,) = tmp_path.glob("with/results*.json")
    found = json.loads(results.read_text())["results"]["texts"]["bits_per_byte,none"]
    assert found == pytest.approx(expected, rel=0.01)

    without = [word.replace("marlin_convert, ", "") for word in words]
    status, printed = evaluate(without, checkpoint, tmp_path / "without", **plugin)
    assert status == 1 and "Unknown quantization type, got marlin" in printed
