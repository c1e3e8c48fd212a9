"""Documents to calibrate on: the builtin text, a file, or as much of a dataset of the Hub as is used."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from marlin_convert import builtin_text, plain_text
from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.hub_calls import hub_errors
from marlin_convert.remote import RemoteFile

# A text, or messages for the model's chat template.
Document = str | list[dict[str, Any]]

BUILTIN = "builtin"

# The columns of a table, and keys of a line of JSON, that hold documents.
COLUMNS = ("text", "messages")
SUFFIXES = (".jsonl", ".txt", ".parquet")
SPLITS = ("train", "test", "val", "dev", "eval")

# Of lines of JSON on the Hub so much is read at a time.
PIECE = 1 << 20


def check_source(source: str) -> None:
    """SourceError for what is no text to calibrate on; a dataset of the Hub is not asked for."""
    path = Path(source)
    if source == BUILTIN or source.startswith("hf:"):
        return
    if not path.is_file():
        raise SourceError(
            f"calibration text '{path}' does not exist.",
            "pass builtin, a .txt, .jsonl or .parquet file, or hf:DATASET.",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise SourceError(
            f"calibration text '{path}' is neither .txt, .jsonl nor .parquet.", "rename it to what it is."
        )


def documents(source: str, seed: int, *, held_out: bool = False) -> Iterator[Document]:
    """The documents of a source in an order drawn by the seed; of the Hub and of tables, piece by piece.

    source: 'builtin', a .txt, .jsonl or .parquet file, or 'hf:DATASET[:SPLIT]'. `held_out` takes the part of
    the builtin text that calibration never sees. SourceError for what is none.
    """
    check_source(source)
    if source.startswith("hf:"):
        yield from _from_hub(source, seed)
    elif source != BUILTIN and Path(source).suffix.lower() == ".parquet":
        yield from _from_table(Path(source), seed)
    else:
        found: list[Document]
        if source == BUILTIN:
            found = [*(builtin_text.python(held_out=True) if held_out else builtin_text.pieces())]
        else:
            found = [*_from_file(Path(source))]
        random.Random(seed).shuffle(found)
        yield from found


def _from_file(path: Path) -> Iterator[Document]:
    if path.suffix.lower() == ".txt":
        yield plain_text.read(path)
        return
    # split("\n"), not splitlines: JSON text may hold other line separators as they are
    for number, line in enumerate(plain_text.read(path).split("\n"), 1):
        if line.strip():
            yield _json_document(line, f"{path.name}, line {number}")


def _json_document(line: str, where: str) -> Document:
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except ValueError as error:
        raise SourceError(
            f"{where}: not JSON ({error}).", "a .jsonl file has one JSON object on each line."
        ) from error
    document = _document(entry, where) if isinstance(entry, dict) else None
    if document is None:
        raise SourceError(
            f"{where}: no 'text' or 'messages'.", 'a line is {"text": "..."} or {"messages": [...]}.'
        )
    return document


def _document(entry: dict[str, Any], where: str) -> Document | None:
    """What a line or a row holds; None where it has neither text nor messages."""
    text, messages = entry.get("text"), entry.get("messages")
    if isinstance(text, str):
        return text
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return [_with_text(message, where) for message in messages]
    return None


def _with_text(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose content is the text that its parts hold: a template would print the list itself."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise SourceError(
                f"{where}: a message has a part of type {kind}; only text can be calibrated on.",
                'leave the line out, or keep of its parts {"type": "text", "text": "..."}.',
            )
        texts.append(text)
    return message | {"content": "".join(texts)}


def _from_table(file: Path | RemoteFile, seed: int) -> Iterator[Document]:
    """The documents of a parquet file, a group of rows after another as the seed draws them.

    ConvertError without pyarrow, SourceError for another table than one of text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConvertError(
            f"calibration text '{file.name}' is stored as parquet, which pyarrow reads.",
            "pip install pyarrow; it comes with the extra 'parquet'.",
        ) from error
    try:
        with file.open("rb") as opened:
            table = pyarrow.parquet.ParquetFile(opened)
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            if not columns:
                there = _some(table.schema_arrow.names)
                raise SourceError(
                    f"'{file.name}' has no column 'text' or 'messages', but {there}.",
                    "choose another dataset, or write its documents as .jsonl.",
                )
            for group in _drawn(table.num_row_groups, seed):
                rows = table.read_row_group(group, columns=columns).to_pylist()
                for row in _drawn(len(rows), seed + group):
                    where = f"{file.name}, row {row} of group {group}"
                    document = _document(_without_nulls(rows[row]), where)
                    if document is None and any(rows[row].values()):
                        raise SourceError(
                            f"{where}: 'text' is no text, or 'messages' are no list of messages.",
                            "choose another dataset, or write its documents as .jsonl.",
                        )
                    if document:
                        yield document
    except pyarrow.ArrowException as error:
        raise SourceError(f"'{file.name}' cannot be read: {error}.", "fetch it again.") from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have the keys that they were written with: a table gives each message all."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return row
    return row | {
        "messages": [
            {key: value for key, value in one.items() if value is not None or key == "content"}
            if isinstance(one, dict)
            else one
            for one in messages
        ]
    }


def _from_hub(source: str, seed: int) -> Iterator[Document]:
    """The documents of a dataset's split (train unless named), file by file and there piece by piece."""
    dataset, _, split = source.removeprefix("hf:").partition(":")
    for file in _data_files(dataset, split):
        if file.name.endswith(".parquet"):
            yield from _from_table(file, seed)
        elif file.name.endswith(".jsonl"):
            yield from _from_lines(file, seed)
        else:
            yield plain_text.read(file.fetch())


def _data_files(dataset: str, split: str) -> list[RemoteFile]:
    """The files of a split at the newest commit; where none is called after a split, all are of train."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(dataset):
        commit = HfApi().dataset_info(dataset).sha or "main"
        tree = list(HfApi().list_repo_tree(dataset, revision=commit, repo_type="dataset", recursive=True))
    data = [one for one in tree if isinstance(one, RepoFile) and one.path.endswith(SUFFIXES)]
    data.sort(key=lambda one: one.path)
    found = [one for one in data if (split or "train") in one.path]
    if not found and not split and not any(word in one.path for one in data for word in SPLITS):
        found = data
    if not found:
        raise SourceError(
            f"dataset {dataset!r} has no .jsonl, .txt or .parquet file of split {split or 'train'!r}.",
            f"it has {_some([one.path for one in data])}; name the split as hf:{dataset}:SPLIT.",
        )
    return [RemoteFile(dataset, commit, one.path, one.size, one.blob_id, "dataset") for one in found]


def _from_lines(file: RemoteFile, seed: int) -> Iterator[Document]:
    """The documents of lines of JSON on the Hub, a piece of the file after another as the seed draws them."""
    for piece in _drawn(-(-file.size // PIECE), seed):
        with file.open("rb", PIECE) as opened:
            # the line that a piece begins in is of the piece before
            opened.seek(max(0, piece * PIECE - 1))
            at = opened.tell() + (len(opened.readline()) if piece else 0)
            lines = []
            while at < (piece + 1) * PIECE and (line := opened.readline()):
                lines.append((at, line))
                at += len(line)
        for number in _drawn(len(lines), seed + piece):
            at, line = lines[number]
            try:
                text = line.decode().strip()
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"'{file.name}' is not UTF-8: byte {at + error.start} is no part of a character.",
                    "choose another dataset.",
                ) from error
            if text:
                yield _json_document(text, f"{file.name}, line at byte {at}")


def _drawn(count: int, seed: int) -> list[int]:
    """The numbers below a count in an order drawn by the seed."""
    return random.Random(seed).sample(range(count), count)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
