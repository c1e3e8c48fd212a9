"""Texts of tables and of datasets on the Hub: what is read of them, and that it is no more than is used."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, fake_hub
from test_hub import environment
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from marlin_convert import documents
from marlin_convert.calibration import calibrate
from marlin_convert.errors import ConvertError, SourceError

# huggingface_hub reads its settings when it is imported: one process asks for all that is below
ASK = """
import json, sys
from itertools import islice
from marlin_convert.documents import documents
from marlin_convert.errors import ConvertError
for line in sys.stdin:
    source, seed, count = json.loads(line)
    try:
        print(json.dumps({"found": list(islice(documents(source, seed), count))}), flush=True)
    except ConvertError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
"""

Ask = Callable[..., dict]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def ask(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(hub, tmp_path_factory.mktemp("home")),
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout

        def ask(source: str, seed: int = 0, count: int | None = None) -> dict:
            assert process.stdin and process.stdout
            print(json.dumps([source, seed, count]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def table(path: Path, columns: dict[str, list], group: int = 100) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table(columns), path, row_group_size=group, compression="none")
    return path


@pytest.fixture(scope="module")
def tokenizer(tinypy: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tinypy)
    of_tools = "{% if m.tool is defined %}!{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + of_tools + "{% endfor %}"
    )
    return tokenizer


def text(number: int) -> str:
    return f"document {number}: " + "def f(x): return x\n" * 100


def served(hub: Hub, name: str) -> int:
    return sum(count for file, count in hub.served.items() if file.startswith(f"datasets/{name}/"))


def test_of_a_table_on_the_hub_the_groups_are_read_that_are_used(hub: Hub, ask: Ask, data: Path) -> None:
    """Drawn by the seed, and only the column of the text."""
    texts = [text(number) for number in range(2000)]
    images = [f"{number:05}" * 1000 for number in range(2000)]
    path = table(data / "train-00000-of-00001.parquet", {"text": texts, "image": images})
    hub.add("datasets/org/table", data.parent)
    first = ask("hf:org/table", 0, 100)["found"]
    assert served(hub, "org/table") < path.stat().st_size / 10
    group = int(first[0].split()[1][:-1]) // 100
    assert sorted(first) == sorted(texts[100 * group : 100 * group + 100])  # one group of rows, as drawn
    assert first != texts[100 * group : 100 * group + 100]
    assert first == ask("hf:org/table:train", 0, 100)["found"] != ask("hf:org/table", 1, 100)["found"]
    assert sorted(ask("hf:org/table")["found"]) == sorted(texts)
    assert ask("hf:org/table", 0, 100)["found"] == list(documents.documents(str(path), 0))[:100]


def test_of_lines_on_the_hub_the_pieces_are_read_that_are_used(hub: Hub, ask: Ask, data: Path) -> None:
    """And every line is in one of them, wherever pieces end."""
    texts = [text(number)[: 50 + number % 1999] for number in range(4000)]
    texts[0] = "x" * (documents.PIECE - len('{"text": ""}\n'))  # the next line begins where a piece does
    texts[7] = "long " * documents.PIECE
    lines = "\n".join(json.dumps({"text": one}) for one in texts)
    (data / "train.jsonl").write_text(lines)
    hub.add("datasets/org/lines", data.parent)
    first = ask("hf:org/lines", 5, 20)["found"]
    assert 0 < served(hub, "org/lines") <= 3 * documents.PIECE < len(lines) / 2
    everything = ask("hf:org/lines", 5)["found"]
    assert everything[:20] == first and everything != ask("hf:org/lines", 6)["found"]
    assert sorted(everything) == sorted(texts)


def test_a_dataset_of_one_split_needs_no_name_of_it(hub: Hub, ask: Ask, data: Path) -> None:
    (data / "dolly-15k.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (data.parent / "more.txt").write_text("c")
    hub.add("datasets/org/single", data.parent)
    assert sorted(ask("hf:org/single")["found"]) == ["a", "b", "c"]
    assert "has no .jsonl, .txt or .parquet file of split 'test'" in ask("hf:org/single:test")["error"]


def test_chat_in_a_table_is_chat_in_lines(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A table gives every message the keys of all others, with nothing in them."""
    chats = [
        [{"role": "user", "content": text(number)}, {"role": "assistant", "content": "x", "tool": "t"}]
        for number in range(3)
    ]
    rows = table(tmp_path / "chat.parquet", {"messages": chats, "id": [1, 2, 3]})
    lines = tmp_path / "chat.jsonl"
    found = list(documents.documents(str(rows), 0))
    assert sorted(map(str, found)) == sorted(map(str, chats))
    lines.write_text("\n".join(json.dumps({"messages": chat}) for chat in found))
    one = tmp_path / "one.jsonl"
    digests = set()
    for path in (rows, lines):
        chat = list(documents.documents(str(path), 0))
        one.write_text(json.dumps({"messages": chat[0]}))
        digests.add(calibrate(tokenizer, str(one), samples=1, length=64, seed=0).digest)
    assert calibrate(tokenizer, str(rows), samples=1, length=64, seed=0).digest in digests


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"question": ["a"], "answer": ["b"]}, "has no column 'text' or 'messages', but question, answer"),
        ({"text": [1, 2]}, "row 1 of group 0: 'text' is no text"),
        ({"messages": [["a"], ["b"]]}, "'text' is no text, or 'messages' are no list of messages"),
        ({"messages": [[{"content": 7}]]}, "row 0 of group 0: a message has a part of type int"),
    ],
)  # fmt: skip
def test_a_table_of_something_else(columns: dict[str, list], said: str, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", columns)
    with pytest.raises(SourceError, match=said):
        list(documents.documents(str(path), 0))


def test_rows_of_nothing_are_none(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"text": ["", None, "a"]})
    assert list(documents.documents(str(path), 0)) == ["a"]


def test_what_is_no_table(hub: Hub, ask: Ask, data: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    (data / "train.parquet").write_bytes(b"PAR1 and no more of it, but for this: PAR1")
    hub.add("datasets/org/damaged", data.parent)
    assert "'data/train.parquet' cannot be read" in ask("hf:org/damaged")["error"]
    (data / "train.parquet").write_bytes(b"")
    hub.add("datasets/org/nothing", data.parent)
    assert "'data/train.parquet' cannot be read" in ask("hf:org/nothing")["error"]


def test_lines_that_are_none_are_named_by_where_they_are(hub: Hub, ask: Ask, data: Path) -> None:
    (data / "train.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    hub.add("datasets/org/bytes", data.parent)
    assert "'data/train.jsonl' is not UTF-8: byte 24 " in ask("hf:org/bytes")["error"]
    (data / "train.jsonl").write_bytes(b'{"text": "a"}\n["text"]\n')
    hub.add("datasets/org/list", data.parent)
    assert "data/train.jsonl, line at byte 14: no 'text' or 'messages'" in ask("hf:org/list")["error"]


def test_a_dataset_from_a_server_that_knows_no_ranges(hub: Hub, ask: Ask, data: Path) -> None:
    table(data / "train.parquet", {"text": ["a"]})
    (data.parent / "lines").mkdir()
    (data.parent / "lines" / "train.jsonl").write_text('{"text": "a"}')
    hub.add("datasets/org/ranges", data.parent)
    hub.ranges = False
    for part in ("data/train", "lines/train"):
        answer = ask(f"hf:org/ranges:{part}")
        assert "only whole, not bytes 0 to" in answer["error"] and "--repo-type dataset" in answer["hint"], (
            answer
        )
    hub.ranges = True


def test_what_reads_tables_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConvertError, match=r"x\.parquet' is stored as parquet, which pyarrow reads"
    ) as refused:
        list(documents.documents(str(tmp_path / "x.parquet"), 0))
    assert refused.value.hint == "pip install pyarrow; it comes with the extra 'parquet'."
