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

from marlin_convert import builtin_text
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
    calibrated, held_out = (set(builtin_text.python(held_out=one)) for one in (False, True))
    # a few files of one line are all alike
    assert all(len(document) < 100 for document in calibrated & held_out)
    assert 0.2 < len(held_out) / len(calibrated | held_out) < 0.3
    assert sum(map(len, calibrated)) > 5_000_000


def test_a_fifth_of_the_builtin_text_is_not_python_s() -> None:
    pieces = list(builtin_text.pieces())
    assert all(0 < len(piece) <= builtin_text.PIECE for piece in pieces)
    documents = [*builtin_text.python(held_out=False), *builtin_text.other()]
    assert "".join(pieces) == "".join(documents)
    assert 0.19 < sum(map(len, builtin_text.other())) / sum(map(len, pieces)) < 0.22
    assert sum(piece.endswith("\n") for piece in pieces) > 0.6 * len(pieces)


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
    with pytest.raises(SourceError, match="no tokenizer that can be read"):
        load_tokenizer(Source(path.parent, "model", None))
    tokenizer = AutoTokenizer.from_pretrained(path.parent)
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_is_the_same_in_every_encoding_that_says_what_it_is(name, encoding, tokenizer, text, tmp_path):
    content = text.read_text() + "\nna\u00efve \u4e2d\u6587\r\n"
    written = content if name == "text.txt" else json.dumps({"text": content}, ensure_ascii=False) + "\n"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    ids = []
    for directory, data in (("plain", written.encode()), (encoding, (mark + written).encode(encoding))):
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).write_bytes(data)
        ids.append(calibrate(tokenizer, str(tmp_path / directory / name), samples=8, length=512, seed=0).ids)
    assert torch.equal(*ids)


@pytest.mark.parametrize(
    "data, said",
    [
        ("def f(x): return x  # \u4e2d\u6587".encode("gbk"), "is not UTF-8: byte 22 (0xd6)"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 3 (0xe9)"),
        ("def f(x)".encode("utf-16-le"), "holds a NUL, after 1 characters"),
        (b"\xef\xbb\xbfabc\xff", "is not UTF-8: byte 6 (0xff)"),
        ("\ufeffabc".encode("utf-16-be")[:-1], "is not UTF-16-BE: byte 6"),
        (b"a\0b", "holds a NUL, after 1 characters"),
    ],
)
def test_what_is_no_text_is_refused_with_the_byte(data, said, tokenizer, tmp_path) -> None:
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError) as refused:
            calibrate(tokenizer, str(tmp_path / name), samples=1, length=1, seed=0)
        assert said in str(refused.value) and name in str(refused.value)
        assert "UTF-8" in (refused.value.hint or "")


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b'{"text": ""}\n', b'{"messages": []}'])
def test_a_text_of_nothing_is_too_short(data, tokenizer, tmp_path) -> None:
    name = "text.jsonl" if data.startswith(b"{") else "text.txt"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConvertError, match=r"tokens; 1 samples of 64 need 64|chat template"):
        calibrate(tokenizer, str(tmp_path / name), samples=1, length=64, seed=0)


@pytest.fixture(scope="module")
def chat(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tinypy)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    return tokenizer


def messages(directory: Path, content) -> str:
    rows = [{"role": "user", "content": content(f"def f{i}(x): return {i}")} for i in range(40)]
    path = directory / "chat.jsonl"
    path.write_text(json.dumps({"messages": rows}) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "parts",
    [
        lambda text: [{"type": "text", "text": text}],
        lambda text: [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}],
        lambda text: [{"text": text}],
        lambda text: [text],
        lambda text: {"type": "text", "text": text},
    ],
)
def test_content_in_parts_is_the_text_they_hold(parts, chat, tmp_path) -> None:
    whole, split = (
        calibrate(chat, messages(tmp_path, content), samples=4, length=64, seed=0).digest
        for content in (str, parts)
    )
    assert whole == split


@pytest.mark.parametrize(
    "part, kind",
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "'text'"),
        (7, "int"),
    ],
)
def test_content_that_is_no_text_is_named(part, kind, chat, tmp_path) -> None:
    path = messages(tmp_path, lambda text: [{"type": "text", "text": text}, part])
    with pytest.raises(SourceError, match=rf"chat\.jsonl, line 1: a message has a part of type {kind}"):
        calibrate(chat, path, samples=1, length=8, seed=0)


@pytest.mark.parametrize("content, kind", [({"type": "image"}, "'image'"), (7, "int")])
def test_content_that_is_one_part_and_no_text(content, kind, chat, tmp_path) -> None:
    path = messages(tmp_path, lambda text: content)
    with pytest.raises(SourceError, match=rf"line 1: a message has a part of type {kind}"):
        calibrate(chat, path, samples=1, length=8, seed=0)


def test_a_name_in_capitals(text, tokenizer, tmp_path) -> None:
    shouted = tmp_path / "TEXT.TXT"
    shouted.write_bytes(text.read_bytes())
    plain, found = (calibrate(tokenizer, str(path), samples=2, length=64, seed=0) for path in (text, shouted))
    assert plain.digest == found.digest


def test_half_a_surrogate_pair_is_no_text(tokenizer, tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(SourceError, match=r"text\.jsonl, line 2"):
        calibrate(tokenizer, str(path), samples=9, length=64, seed=0)


def test_the_ids_are_those_of_tokenizer_json_whatever_the_class(tinypy, text, tmp_path, caplog) -> None:
    """Qwen2's class splits digits one by one, which the vocabulary of tinypy does not."""
    plain = load_tokenizer(Source(tinypy, "tinypy", None))
    assert not caplog.records
    directory = Path(shutil.copytree(tinypy, tmp_path / "model"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    taken = load_tokenizer(Source(directory, "model", None))
    assert "Qwen2Tokenizer splits text otherwise than tokenizer.json" in caplog.text
    one, other = (calibrate(t, str(text), samples=8, length=512, seed=0) for t in (plain, taken))
    assert one.digest == other.digest
    trusting = AutoTokenizer.from_pretrained(directory)
    assert calibrate(trusting, str(text), samples=8, length=512, seed=0).digest != one.digest


def test_what_reads_a_sentencepiece_vocabulary_is_named(tinypy, tmp_path, monkeypatch) -> None:
    directory = Path(shutil.copytree(tinypy, tmp_path / "model"))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as Python has it where it is not installed
    with pytest.raises(
        SourceError, match=r"tokenizer\.model of model is in sentencepiece's format"
    ) as refused:
        load_tokenizer(Source(directory, "model", None))
    assert "pip install sentencepiece" in (refused.value.hint or "")
