"""Text to token ids: the same ones every time, and never those that a model is tested on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from marlin_convert import calibration
from marlin_convert.calibration import calibrate, load_tokenizer
from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.hub import Source


@pytest.fixture(scope="module")
def tokenizer(tinypy: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tinypy)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 20 thousand tokens, no window of them like another."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"def function_{i}(x): return x + {i * i}" for i in range(1500)))
    return path


def test_the_builtin_text_is_the_same_every_time(tokenizer: PreTrainedTokenizerBase, tinypy: Path) -> None:
    one, other = (calibrate(tokenizer, "builtin", samples=8, length=64, seed=0) for _ in range(2))
    assert one.ids.shape == (8, 64) and one.ids.dtype == torch.int64
    assert torch.equal(one.ids, other.ids) and one.digest == other.digest
    assert one.source == "builtin"
    code = (
        "from transformers import AutoTokenizer; from marlin_convert.calibration import calibrate;"
        f"t = AutoTokenizer.from_pretrained({str(tinypy)!r});"
        "print(calibrate(t, 'builtin', samples=8, length=64, seed=0).digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == one.digest, done.stderr


def test_held_out_documents_are_none_of_those_calibrated_on() -> None:
    calibrated, held_out = set(calibration._builtin(False)), set(calibration._builtin(True))
    # a few files of one line are all alike
    assert all(len(document) < 100 for document in calibrated & held_out)
    assert 0.2 < len(held_out) / len(calibrated | held_out) < 0.3
    assert sum(map(len, calibrated)) > 5_000_000


def test_held_out_windows_differ_from_calibration(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = []
    for held_out in (False, True):
        found = calibrate(tokenizer, "builtin", samples=64, length=32, seed=0, held_out=held_out)
        windows.append({tuple(row) for row in found.ids.tolist()})
    assert not windows[0] & windows[1]


@pytest.mark.parametrize("source", ["builtin", "text"])
def test_another_seed_draws_other_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    name = source if source == "builtin" else str(text)
    one, other = (calibrate(tokenizer, name, samples=8, length=64, seed=seed) for seed in (0, 1))
    assert one.digest != other.digest
    rows = [{tuple(row) for row in found.ids.tolist()} for found in (one, other)]
    assert rows[0] != rows[1]


def test_windows_of_a_text_do_not_overlap(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    ids = tokenizer(text.read_text())["input_ids"]
    found = calibrate(tokenizer, str(text), samples=8, length=64, seed=3).ids.tolist()
    starts = [at for at in range(0, len(ids) - 63, 64) for row in found if ids[at : at + 64] == row]
    assert len(set(starts)) == 8


def test_the_windows_come_from_the_whole_of_a_long_text(
    tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    ids = tokenizer(text.read_text())["input_ids"]
    found = calibrate(tokenizer, str(text), samples=8, length=64, seed=0).ids.tolist()
    last = max(at for at in range(0, len(ids) - 63, 64) if ids[at : at + 64] in found)
    assert last > len(ids) // 2


def test_the_name_shown_is_no_path(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    assert calibrate(tokenizer, str(text), samples=1, length=8, seed=0).source == "text.txt"


def test_lines_of_json(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    # U+2028 ends a line for str.splitlines, not for JSON
    words = ["one\u2028two three four five six", "seven eight nine ten eleven"]
    path.write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in words), "utf-8")
    expected = {tokenizer(word)["input_ids"][0] for word in words}
    found = calibrate(tokenizer, str(path), samples=1, length=8, seed=0)
    assert int(found.ids[0, 0]) in expected


def test_messages_go_through_the_chat_template(tinypy: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinypy)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "(x): return x"}]
    path.write_text(json.dumps({"messages": messages}))
    found = calibrate(tokenizer, str(path), samples=1, length=10, seed=0)
    expected = tokenizer("<user> def f\n<assistant> (x): return x\n", add_special_tokens=False)["input_ids"]
    assert found.ids[0].tolist() == expected[:10]


def test_a_tokenizer_that_takes_no_text(tinypy: Path, text: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tinypy, tmp_path / "model") / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"] |= {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "absent"}
    path.write_text(json.dumps({**settings, "pre_tokenizer": None, "post_processor": None}))
    tokenizer = load_tokenizer(Source(path.parent, "model", None))
    with pytest.raises(SourceError, match="does not take this text"):
        calibrate(tokenizer, str(text), samples=1, length=8, seed=0)


@pytest.mark.parametrize("samples, length, hint", [(9, 3, "--samples 6"), (1, 100, "--sequence-length")])
def test_a_text_too_short_says_the_counts(
    samples: int, length: int, hint: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a")
    count = 0
    while count != 20:
        path.write_text(path.read_text() + " a")
        count = len(tokenizer(path.read_text())["input_ids"])
    with pytest.raises(ConvertError) as refused:
        calibrate(tokenizer, str(path), samples=samples, length=length, seed=0)
    assert str(refused.value) == (
        f"calibration text short.txt has 20 tokens; {samples} samples of {length} need {samples * length}."
    )
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{}"}, {"tokenizer.json": "\0"}])
def test_no_tokenizer(files: dict[str, str], tinypy: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tinypy / "config.json").read_text())
    for name, data in files.items():
        (tmp_path / name).write_text(data)
    with pytest.raises(ConvertError, match="has no tokenizer"):
        load_tokenizer(Source(tmp_path, "model", None))
