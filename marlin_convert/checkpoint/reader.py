"""Hugging Face model directories, opened from their headers only and trusted only once checked.

Weights are safetensors (huggingface/safetensors): 8 bytes of header length, a JSON header, the tensor data.
torch takes longer to import than the headers of a large model to read: it is imported with the first tensor.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from marlin_convert.errors import SourceError, reading

if TYPE_CHECKING:
    import torch

# what safetensors calls a type: its name in torch, and its bytes
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

# Under which of these keys a config.json says how its weights are packed: llm-compressor's of early 2024 and
# MLX's have names of their own.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
NESTING_LIMIT = 100  # that of its JSON reader is 128
AT_ONCE = 16  # headers that are asked for of a server

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Files an output needs to be used as its source was, matched without regard to case. README.md is not among
# them: a converted model needs a card of its own.
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "*processor_config.json",
    "chat_template*.json",
    "chat_template*.jinja",
    "additional_chat_templates/*.jinja",
    "license*",
    "notice*",
    "use_policy*",
)

# What an output has of its own, or what is of no use without a source's weights.
DESCRIBING = (
    ".*",
    "README.md",
    "config.json",
    "*.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    "marlin_convert*.json",
    "recipe*.yaml",
)


class Elsewhere(Protocol):
    """A weight file that need not be on this disk; `digest` is of its content.

    Until it `comes`, opening it is to look at a part; then it is to wait for the whole.
    """

    name: str
    size: int
    digest: str
    comes: bool

    def open(self, mode: Literal["rb"], buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        """Its bytes, to be read from any place."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; its bytes are `start` to `end` of `file`."""

    name: str
    code: str  # its type, a key of DTYPES
    shape: tuple[int, ...]
    file: Path | Elsewhere
    start: int
    end: int

    @property
    def dtype(self) -> "torch.dtype":
        """Its type."""
        import torch

        return getattr(torch, DTYPES[self.code][0])

    def read(self) -> "torch.Tensor":
        """Read it into memory of its own; raises SourceError if the file shrank or cannot be read."""
        return self._read_as(self.dtype).reshape(self.shape)

    def _read_as(self, dtype: "torch.dtype") -> "torch.Tensor":
        """The elements that the bytes are in this type, (count,)."""
        import torch

        # Not a memory map: its pages would count as ours for as long as the system cares to keep them.
        raw = torch.empty(self.end - self.start, dtype=torch.uint8)
        view = raw.numpy().data
        with reading(self.file), self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise SourceError(
                        f"'{self.file}' ends {len(view)} bytes early in tensor {self.name!r}.",
                        "it changed since it was opened; start again.",
                    )
                view = view[count:]
        return raw.view(dtype)


@dataclass(frozen=True)
class Slice(TensorInfo):
    """One of the tensors that a tensor of the files is made of: some rows of what `start` to `end` hold.

    What is there has the shape `stored` and is turned over where it is `transposed`; `rows` are taken then.
    """

    stored: tuple[int, ...]
    transposed: bool
    rows: slice

    def read(self) -> "torch.Tensor":
        """Read it into memory of its own."""
        whole = self._read_as(self.dtype).reshape(self.stored)
        return (whole.T if self.transposed else whole)[self.rows].contiguous()


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose headers have been checked; tensors are read one by one, from any thread."""

    directory: Path
    config: dict[str, Any]
    quantization_config: dict[str, Any] | None
    said_in: str  # where that is said, for messages
    tensors: dict[str, TensorInfo]  # in the order of the files and of the bytes in them
    weight_files: list[Path | Elsewhere]
    _fingerprint: str

    @classmethod
    def open(cls, directory: Path, elsewhere: Mapping[str, Elsewhere] | None = None) -> "Checkpoint":
        """Read and check config.json, the index and every safetensors header; raises SourceError.

        `elsewhere` has the weight files that are not in the directory, by name.
        """
        if not directory.is_dir():
            raise SourceError(f"'{directory}' is not a directory.")
        if not (directory / "config.json").exists():
            raise SourceError(
                f"'{directory}' has no config.json.",
                "give the directory of a Hugging Face model, or a Hub id.",
            )
        config_bytes = _bytes(directory, "config.json")
        config = _json_object(config_bytes, directory / "config.json")

        elsewhere = elsewhere or {}
        promised = _promised(directory, elsewhere)
        files: list[Path | Elsewhere] = [elsewhere.get(file, directory / file) for file in promised]
        tensors: dict[str, TensorInfo] = {}
        twice: list[str] = []
        missing: list[str] = []
        foreign: list[str] = []
        digest = hashlib.sha256()
        _frame(digest, config_bytes)
        for (file, names), path, (header, found) in zip(
            promised.items(), files, _headers(files), strict=True
        ):
            twice += [
                f"{name!r} in {tensors[name].file.name!r} and {file!r}" for name in found if name in tensors
            ]
            if names is not None:
                missing += [f"{name!r}" for name in sorted(names - found.keys())]
                foreign += [f"{name!r} in {file!r}" for name in found if name not in names]
            tensors.update(found)
            _frame(digest, f"{file}\0{_state(path)}".encode(errors="surrogateescape"))
            _frame(digest, header)
        for problem, names_at_fault in (
            ("stored in two shards", twice),
            ("listed in the index but not stored", missing),
            ("stored but not in the index", foreign),
        ):
            if names_at_fault:
                raise SourceError(
                    f"'{directory}' has tensors {problem} ({len(names_at_fault)}): {_some(names_at_fault)}.",
                    "fetch the model again; its index and shards are not of one save.",
                )
        quantization_config, said_in = _quantization_config(directory, config)
        return cls(
            directory=directory,
            config=config,
            quantization_config=quantization_config,
            said_in=said_in,
            tensors=tensors,
            weight_files=files,
            _fingerprint=digest.hexdigest(),
        )

    @property
    def on_disk(self) -> bool:
        """Whether every weight file is on this disk."""
        return all(isinstance(file, Path) for file in self.weight_files)

    @property
    def only_looked_at(self) -> bool:
        """Whether weight files are elsewhere and stay there: what is long is not to be read."""
        return any(not isinstance(file, Path) and not file.comes for file in self.weight_files)

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor, as `TensorInfo.read` does."""
        return self.tensors[name].read()

    def companions(self) -> list[str]:
        """Name the files to carry over unchanged: tokenizer, generation, chat template and license files.

        Names are relative, with '/' for the one folder there may be (additional_chat_templates).
        """
        paths = [*self.directory.glob("*"), *self.directory.glob("additional_chat_templates/*.jinja")]
        names = {path.relative_to(self.directory).as_posix(): path for path in paths}
        return sorted(
            name
            for name, path in names.items()
            if any(fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)
            and not path.name.startswith(".")
            and path.name.isprintable()
            and path.suffix.lower() not in (".py", ".safetensors", *PICKLES)
            and belongs(path, self.directory)
        )

    def others(self) -> list[str]:
        """Name the files beside the weights but for those that describe them and how they were made."""
        known = {path.name for path in self.weight_files}
        return sorted(
            path.name
            for path in self.directory.iterdir()
            if path.is_file()
            and path.name not in known
            and path.name.isprintable()
            and not any(fnmatchcase(path.name, pattern) for pattern in DESCRIBING)
        )

    def fingerprint(self) -> str:
        """Tell this source from any other, to refuse a resume with another: a sha256, in hex.

        It covers config.json and each weight file's name, size, time of change and header; of a file of the
        Hub, here or still there, its digest in place of the time.
        """
        return self._fingerprint


def belongs(path: Path, directory: Path) -> bool:
    """Say whether `path` is a regular file of `directory`, symlinks followed.

    A link may lead to another file of the directory or, if the directory is a snapshot in a Hugging Face
    cache (models--org--name/snapshots/<commit>), to the blobs of that model.
    """
    if not path.is_file():
        return False
    target, home = path.resolve(), directory.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(target.is_relative_to(root) for root in roots)


def json_file(directory: Path, name: str, strict: bool = False) -> dict[str, Any]:
    """Read a JSON object, without duplicate keys if `strict`; raises SourceError."""
    return _json_object(_bytes(directory, name), directory / name, strict)


def _promised(directory: Path, elsewhere: Mapping[str, Elsewhere]) -> dict[str, set[str] | None]:
    """The weight files and, if there is an index, the tensors it promises in each."""
    with reading(directory):
        here = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    names = sorted(here | elsewhere.keys())
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    singles = [name for name in names if name.endswith(".safetensors")]
    if INDEX in indexes:
        promised = _read_index(directory, INDEX, singles)
        if SINGLE in singles and SINGLE not in promised:
            raise SourceError(
                f"'{directory}' has both {SINGLE} and an index of other files.",
                "remove the one that is stale.",
            )
        return promised
    if SINGLE in singles:
        return {SINGLE: None}
    # AutoGPTQ names its files after the quantization: gptq_model-4bit-128g.safetensors
    if len(indexes) == 1:
        return _read_index(directory, indexes[0], singles)
    if len(singles) == 1:
        return {singles[0]: None}
    if singles:
        raise SourceError(
            f"'{directory}' has {len(singles)} safetensors files and no {INDEX}: {_some(singles)}.",
            "fetch the model again, with its index.",
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise SourceError(
            f"'{directory}' has its weights in pickle files only ({_some(pickles)}); "
            "loading those can run code, so they are not read.",
            "convert them to safetensors: where you trust them, load them with transformers and save.",
        )
    raise SourceError(
        f"'{directory}' has no weights (*.safetensors).", "give the directory of a whole model."
    )


def _read_index(directory: Path, name: str, present: list[str]) -> dict[str, set[str] | None]:
    path = directory / name
    weight_map = json_file(directory, name, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"'{path}' has no weight_map.", "fetch it again.")
    promised: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # The index comes with the model: a path in it could name any file of this machine.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or not file.endswith(".safetensors")
        ):
            raise SourceError(
                f"'{path}' puts tensor {tensor!r} in {file!r}, which is not a plain file name.",
                "shards lie beside their index; fetch the model again, from where you trust it.",
            )
        promised.setdefault(file, set()).add(tensor)
    missing = [f"{file!r}" for file in sorted(promised) if file not in present]
    if missing:
        raise SourceError(
            f"'{directory}' lacks {len(missing)} of {len(promised)} shards: {_some(missing)}.",
            "fetch them again.",
        )
    return {file: promised[file] for file in sorted(promised)}


def _quantization_config(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """As vLLM and AutoGPTQ look for it, and where it is: in config.json, else in a file of its own."""
    for key in QUANTIZATION_KEYS:
        found = config.get(key)
        if found is not None and not isinstance(found, dict):
            raise SourceError(
                f"'{directory / 'config.json'}' has a {key} that is not an object.", "fetch it again."
            )
        if found:
            return found, f"config.json's {key}"
    for name in ("quantize_config.json", "quant_config.json"):
        if (directory / name).exists():
            return json_file(directory, name), name
    return None, ""


def _headers(files: list[Path | Elsewhere]) -> Iterable[tuple[bytes, dict[str, TensorInfo]]]:
    """Read and check the headers of all files; those that are elsewhere are asked for many at a time."""
    if all(isinstance(file, Path) for file in files):
        yield from map(_header, files)
        return
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="headers") as pool:
        try:
            yield from pool.map(_header, files)
        finally:
            pool.shutdown(cancel_futures=True)


def _state(file: Path | Elsewhere) -> str:
    """What changes when a file does: its size, and its digest or when it was changed."""
    if not isinstance(file, Path):
        return f"{file.size}\0{file.digest}"
    size, blob = file.stat().st_size, file.resolve()
    # in a cache of the Hub's client a blob is called by its digest
    if file.is_symlink() and blob.parent.name == "blobs":
        return f"{size}\0{blob.name}"
    return f"{size}\0{file.stat().st_mtime_ns}"


def _header(path: Path | Elsewhere) -> tuple[bytes, dict[str, TensorInfo]]:
    """Read and check one safetensors header: its bytes, and its tensors in the order of their offsets."""
    if isinstance(path, Path) and not belongs(path, path.parent):
        raise SourceError(
            f"'{path}' is not a file of this directory (a link leading out, or not a regular file).",
            "put the file itself there, if you trust it.",
        )
    with reading(path), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise SourceError(
                f"'{path}' is truncated or not safetensors: {size} bytes, header of {length}.",
                "fetch it again.",
            )
        header = file.read(length)
    if not header.startswith(b"{"):
        raise SourceError(f"'{path}' is not safetensors: its header is not JSON.")
    entries = _json_object(header, path, strict=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"'{path}' has a __metadata__ that does not map text to text.")

    data = 8 + length
    infos = [_tensor(name, entry, path, data) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = data
    for info in infos:
        if info.start != position:
            raise SourceError(
                f"'{path}' has {'a hole' if info.start > position else 'overlapping bytes'} before tensor "
                f"{info.name!r}: it begins at {info.start}, the one before ends at {position}."
            )
        position = info.end
    if position != size:
        raise SourceError(
            f"'{path}' is {'truncated' if size < position else 'too long'}: "
            f"its header describes {position} bytes, it has {size}.",
            "fetch it again.",
        )
    return header, {info.name: info for info in infos}


def _tensor(name: str, entry: Any, path: Path | Elsewhere, data: int) -> TensorInfo:
    where = f"'{path}', tensor {name!r}"
    if not name.isprintable():
        raise SourceError(f"{where}: not a name that can be shown.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SourceError(f"{where}: not described by an object of dtype, shape and data_offsets.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise SourceError(f"{where}: unknown dtype {code!r}.")
    # torch needs strides, also those of an empty tensor, to fit 64 bits
    if not _counts(shape) or len(shape) > 64 or math.prod(size or 1 for size in shape) >= 2**60:
        raise SourceError(f"{where}: shape {shape!r} is not a list of sizes.")
    if not _counts(offsets) or len(offsets) != 2:
        raise SourceError(f"{where}: data_offsets {offsets!r} are not two offsets.")
    needed = math.prod(shape) * DTYPES[code][1]
    if offsets[1] - offsets[0] != needed:
        raise SourceError(f"{where}: {code} {shape} takes {needed} bytes, its offsets {offsets} do not.")
    return TensorInfo(name, code, tuple(shape), path, data + offsets[0], data + offsets[1])


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(count) is int and 0 <= count < 2**60 for count in value)


def _bytes(directory: Path, name: str) -> bytes:
    path = directory / name
    if not belongs(path, directory):
        raise SourceError(
            f"'{path}' is not a file of this directory (a link leading out, or not a regular file).",
            "put the file itself there, if you trust it.",
        )
    with reading(path):
        if (size := path.stat().st_size) > HEADER_LIMIT:
            raise SourceError(f"'{path}' has {size} bytes, more than any JSON of a model.", "fetch it again.")
        return path.read_bytes()


def _json_object(text: bytes, path: Path | Elsewhere, strict: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_duplicates if strict else None)
        _check_plain(value)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' holds invalid JSON: {error}.", "fetch it again.") from error
    if not isinstance(value, dict):
        raise SourceError(f"'{path}' holds JSON that is not an object.", "fetch it again.")
    return value


def _check_plain(value: Any, depth: int = 0) -> None:
    """ValueError for what could be read, but not shown or written again: lone surrogates and deep nesting."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if depth == NESTING_LIMIT:
            raise ValueError(f"nested more than {NESTING_LIMIT} deep")
        for item in value:
            _check_plain(item, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                _check_plain(item, depth + 1)


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is there twice")
        result[key] = value
    return result


def _frame(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
