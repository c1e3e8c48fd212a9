"""What the writer puts on disk, byte by byte, through interruptions and full disks."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marlin_convert.checkpoint import writer as writer_module
from marlin_convert.checkpoint.reader import DTYPES, Checkpoint
from marlin_convert.checkpoint.writer import (
    REPLACED,
    ShardWriter,
    TensorSpec,
    publish,
    remove,
    write_json,
    write_report,
)
from marlin_convert.errors import ConvertError, SourceError


def some_tensors(count: int = 7) -> dict[str, torch.Tensor]:
    """Of sizes that need ordering, a scalar, an empty one and a bfloat16 one among them."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for i in range(count):
        dtype = [torch.int32, torch.bfloat16, torch.uint8, torch.float32][i % 4]
        tensors[f"layers.{i}.w"] = torch.randint(0, 100, (2 * i + 1, 3), generator=generator).to(dtype)
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.float64)
    tensors["empty"] = torch.empty(0, 3)
    return tensors


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def save(directory: Path, tensors: dict[str, torch.Tensor], max_shard_size: int = 10**9) -> dict[str, str]:
    directory.mkdir(exist_ok=True)
    with ShardWriter(directory, specs_of(tensors), max_shard_size) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
        return writer.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_exact_bytes_of_a_small_file(tmp_path):
    files = save(
        tmp_path,
        {
            "b": torch.tensor([1, -2], dtype=torch.int8),
            "a": torch.tensor([[1.0, -1.0], [0.5, 0.0]], dtype=torch.float16),
        },
    )
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"I8","shape":[2],"data_offsets":[8,10]}}    '
    )
    assert len(header) % 8 == 0
    content = len(header).to_bytes(8, "little") + header + b"\x00\x3c\x00\xbc\x00\x38\x00\x00\x01\xfe"
    assert contents(tmp_path) == {"model.safetensors": content}
    assert files == {"model.safetensors": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("max_shard_size", [1, 100, 10**9])
def test_the_library_and_our_reader_read_what_we_write(tmp_path, max_shard_size):
    tensors = some_tensors()
    files = save(tmp_path, tensors, max_shard_size)
    assert files == {name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path).items()}
    loaded = {}
    for path in tmp_path.glob("*.safetensors"):
        loaded.update(load_file(path))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert loaded.keys() == checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.equal(loaded[name]) and tensor.equal(checkpoint.read(name))
        assert tensor.dtype == loaded[name].dtype == checkpoint.read(name).dtype


def test_every_dtype_survives(tmp_path):
    raw = torch.arange(16, dtype=torch.uint8)
    tensors = {
        code: (raw % 2 if name == "bool" else raw).view(getattr(torch, name)).clone()
        for code, (name, _) in DTYPES.items()
    }
    save(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for code, tensor in tensors.items():
        assert checkpoint.tensors[code].dtype == tensor.dtype
        assert checkpoint.read(code).view(torch.uint8).equal(tensor.view(torch.uint8))


def test_a_tensor_need_not_be_contiguous(tmp_path):
    tensor = torch.arange(12).view(3, 4).t()
    save(tmp_path, {"w": tensor})
    assert load_file(tmp_path / "model.safetensors")["w"].equal(tensor)


def test_every_tensor_is_aligned_and_order_is_otherwise_kept(tmp_path):
    tensors = some_tensors(40)
    order = ShardWriter(tmp_path, specs_of(tensors), 200).order
    whole = [name for name, tensor in tensors.items() if tensor.nbytes % 8 == 0]
    assert order[: len(whole)] == whole and sorted(order) == sorted(tensors)
    save(tmp_path, tensors, 200)
    (tmp_path / "config.json").write_text("{}")
    for info in Checkpoint.open(tmp_path).tensors.values():
        assert info.start % info.dtype.itemsize == 0


def test_shards_are_filled_in_order(tmp_path):
    tensors = {f"w{i}": torch.zeros(size, dtype=torch.int64) for i, size in enumerate([2, 3, 1, 9, 1, 1])}
    save(tmp_path, tensors, 48)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 17 * 8},
        "weight_map": {
            "w0": "model-00001-of-00003.safetensors",
            "w1": "model-00001-of-00003.safetensors",
            "w2": "model-00001-of-00003.safetensors",
            "w3": "model-00002-of-00003.safetensors",
            "w4": "model-00003-of-00003.safetensors",
            "w5": "model-00003-of-00003.safetensors",
        },
    }
    assert list(index["weight_map"]) == sorted(tensors)


def test_wrong_calls_are_bugs(tmp_path):
    with pytest.raises(RuntimeError, match="unique"):
        ShardWriter(tmp_path, [], 1)
    with pytest.raises(RuntimeError, match="unique"):
        ShardWriter(tmp_path, [TensorSpec("a", torch.int8, (1,))] * 2, 1)
    specs = [TensorSpec("a", torch.int8, (8,)), TensorSpec("b", torch.int8, (8,))]
    with ShardWriter(tmp_path, specs, 10**9) as writer:
        for name, tensor in (
            ("b", torch.zeros(8, dtype=torch.int8)),
            ("a", torch.zeros(8, dtype=torch.uint8)),
            ("a", torch.zeros(2, 4, dtype=torch.int8)),
        ):
            with pytest.raises(RuntimeError, match="expected"):
                writer.write(name, tensor)
        writer.write("a", torch.zeros(8, dtype=torch.int8))
        with pytest.raises(RuntimeError, match="1 tensors were never written"):
            writer.close()
        with pytest.raises(RuntimeError, match="before the first write"):
            writer.resume(1)
        writer.write("b", torch.zeros(8, dtype=torch.int8))
        with pytest.raises(RuntimeError, match="expected None"):
            writer.write("b", torch.zeros(8, dtype=torch.int8))


# Interruption


@pytest.mark.parametrize("max_shard_size", [60, 10**9])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_resumed_after_any_tensor_the_bytes_are_the_same(tmp_path, max_shard_size, ahead):
    tensors = some_tensors()
    files = save(tmp_path / "whole", tensors, max_shard_size)
    for count in range(len(tensors) + 1):
        directory = tmp_path / f"{count}"
        directory.mkdir()
        with ShardWriter(directory, specs_of(tensors), max_shard_size) as writer:
            for name in writer.order[:count]:
                writer.write(name, tensors[name])
            assert writer.sync() == count
            # What comes after the last sync may or may not have reached the disk.
            for name in writer.order[count : count + ahead]:
                writer.write(name, tensors[name] * 0 + 1)
            if ahead == 3:
                writer.sync()
        with ShardWriter(directory, specs_of(tensors), max_shard_size) as writer:
            writer.resume(count)
            for name in writer.order[count:]:
                writer.write(name, tensors[name])
            assert writer.close() == files
        assert contents(directory) == contents(tmp_path / "whole")


def test_resume_refuses_what_is_not_there(tmp_path):
    tensors = some_tensors()
    save(tmp_path, tensors, 60)
    with (
        ShardWriter(tmp_path, specs_of(tensors), 60) as writer,
        pytest.raises(SourceError, match="99 tensors of"),
    ):
        writer.resume(99)

    first = tmp_path / min(contents(tmp_path))
    good = first.read_bytes()
    first.write_bytes(good[:-1])
    with ShardWriter(tmp_path, specs_of(tensors), 60) as writer, pytest.raises(SourceError) as caught:
        writer.resume(len(tensors))
    assert f"{len(good) - 1} bytes, {len(good)} were written" in str(caught.value)

    first.write_bytes(good[:40] + b"X" + good[41:])
    with (
        ShardWriter(tmp_path, specs_of(tensors), 60) as writer,
        pytest.raises(SourceError, match="other tensors"),
    ):
        writer.resume(1)
    assert len(first.read_bytes()) == len(good)

    first.unlink()
    with (
        ShardWriter(tmp_path, specs_of(tensors), 60) as writer,
        pytest.raises(SourceError, match="has 0 bytes"),
    ):
        writer.resume(1)


def test_resume_from_nothing_removes_earlier_shards(tmp_path):
    tensors = some_tensors()
    save(tmp_path, tensors, 60)
    with ShardWriter(tmp_path, specs_of(tensors), 60) as writer:
        writer.resume(0)
        assert list(tmp_path.glob("*.safetensors")) == []


# The disk


def test_a_full_disk_is_an_oserror_and_can_be_resumed(tmp_path):
    """A limit on file size stands for the full disk: the same failing write(2), half a tensor written."""
    code = """
import resource, sys, torch
from pathlib import Path
from marlin_convert.checkpoint import writer as module
from marlin_convert.checkpoint.writer import ShardWriter, TensorSpec
module.WAITING_BYTES = 10_000
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
specs = [TensorSpec(str(i), torch.uint8, (10_000,)) for i in range(60)]
with ShardWriter(Path(sys.argv[1]), specs, 10**9) as writer:
    failures = []
    def attempt(act, *arguments):
        try:
            return act(*arguments)
        except OSError as error:
            failures.append(error)
    for i in range(60):
        attempt(writer.write, str(i), torch.full((10_000,), i, dtype=torch.uint8))
        if i == 1:
            print(writer.sync())
        if failures:
            break
    attempt(writer.sync)
    attempt(writer.sync)
    assert len(failures) == 3 and len({id(error) for error in failures}) == 1
    print(failures[0].errno)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["2", str(errno.EFBIG)], done.stderr
    tensors = {str(i): torch.full((10_000,), i, dtype=torch.uint8) for i in range(60)}
    with ShardWriter(tmp_path, specs_of(tensors), 10**9) as writer:
        writer.resume(2)
        for name in writer.order[2:]:
            writer.write(name, tensors[name])
        writer.close()
    save(tmp_path / "whole", tensors)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == whole


@pytest.mark.gpu
@pytest.mark.parametrize("size", [10**9, 7 << 20, 1])
def test_what_a_gpu_has_is_written_as_it_was_when_it_was_given(size: int, tmp_path):
    """Not before it is there, and whoever gets its memory next; in one file and in many."""
    tensors = {f"{i:02}": torch.full((1 << 20,), i, dtype=torch.uint8) for i in range(40)}
    tensors["05"] = torch.arange(1 << 20).to(torch.uint8).view(1 << 10, 1 << 10).T
    tensors["06"] = torch.full((20 << 20,), 6, dtype=torch.uint8)
    with ShardWriter(tmp_path, specs_of(tensors), size) as writer:
        for name in writer.order:
            torch.cuda._sleep(10_000_000)
            given = tensors[name].T.contiguous().cuda().T if name == "05" else tensors[name].cuda() + 0
            assert given.is_contiguous() == (name != "05")
            writer.write(name, tensors[name] if name == "20" else given)
            torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda")
        files = writer.close()
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == files[file.name]
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_few_bytes_wait_for_the_disk(tmp_path, monkeypatch):
    """As many as one block has, and not as many tensors: those of experts are small."""
    monkeypatch.setattr(writer_module, "WAITING_BYTES", 99 * 1000)
    disk, append = threading.Event(), ShardWriter._append

    def slow(*arguments):
        disk.wait()
        append(*arguments)

    monkeypatch.setattr(ShardWriter, "_append", slow)
    tensors = {f"{i:03}": torch.full((1000,), i % 100, dtype=torch.uint8) for i in range(150)}
    taken = []
    (tmp_path / "slow").mkdir()
    with ShardWriter(tmp_path / "slow", specs_of(tensors), 10**9) as writer:

        def write():
            for name in writer.order:
                writer.write(name, tensors[name])
                taken.append(name)

        writing = threading.Thread(target=write)
        writing.start()
        writing.join(0.5)
        by_then = len(taken)
        disk.set()
        writing.join()
        assert by_then == 100
        writer.close()
    save(tmp_path / "whole", tensors)
    assert contents(tmp_path / "slow") == contents(tmp_path / "whole")


def test_a_failed_file_surfaces_and_leaves_no_thread(tmp_path):
    before = threading.active_count()
    with ShardWriter(tmp_path / "absent", specs_of(some_tensors()), 10**9) as writer:
        writer.write(writer.order[0], some_tensors()[writer.order[0]])
        for act in (writer.sync, writer.sync):
            with pytest.raises(FileNotFoundError):
                act()
    assert threading.active_count() == before


def test_a_failed_fsync_is_for_good(tmp_path, monkeypatch):
    tensors = some_tensors()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "lost")

    with ShardWriter(tmp_path, specs_of(tensors), 10**9) as writer:
        writer.write(writer.order[0], tensors[writer.order[0]])
        with monkeypatch.context() as patch, pytest.raises(OSError, match="lost"):
            patch.setattr(os, "fsync", fail)
            writer.sync()
        with pytest.raises(OSError, match="lost"):
            writer.sync()
        with pytest.raises(OSError, match="lost"):
            writer.write(writer.order[1], tensors[writer.order[1]])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        save(tmp_path, some_tensors(), 60)
        write_json(tmp_path / "config.json", {})
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "a.json.tmp").symlink_to("other")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "other").read_text() == "mine" and (tmp_path / "a.json").read_text() == "1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "other"]


def test_json_is_deterministic_and_whole_or_absent(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"b": [1, "ü"], "a": None})
    assert path.read_bytes() == b'{\n  "b": [\n    1,\n    "\\u00fc"\n  ],\n  "a": null\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert path.read_bytes().startswith(b"{\n")
    write_json(path, {})
    assert contents(tmp_path) == {"config.json": b"{}\n"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_nothing_is_left_of_json_that_could_not_be_written(call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "broken")

    write_json(tmp_path / "config.json", {})
    monkeypatch.setattr(os, "fsync" if call == "fsync" else "replace", fail)
    with pytest.raises(OSError, match="broken"):
        write_json(tmp_path / "config.json", {"new": 1})
    assert contents(tmp_path) == {"config.json": b"{}\n"}


def test_a_report_goes_where_it_is_told(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_report(tmp_path / "link", "words", "")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "words"
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_report(tmp_path / "pipe", "words", "")
    assert os.read(pipe, 100) == b"words"
    os.close(pipe)
    with pytest.raises(ConvertError, match="cannot be written") as caught:
        write_report(tmp_path / "absent" / "report", "words", "make it")
    assert caught.value.hint == "make it"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "pipe", "target"}


# Publishing


@pytest.fixture
def partial(tmp_path):
    (tmp_path / "out.partial" / "sub").mkdir(parents=True)
    (tmp_path / "out.partial" / "new").write_text("new")
    (tmp_path / "out.partial" / "sub" / "new").write_text("new")
    return tmp_path / "out.partial"


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways of putting a directory in another's place."""
    if request.param == "two renames":
        monkeypatch.setattr(writer_module, "_exchange", lambda one, other: False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_publish_is_one_rename(tmp_path, partial, overwrite):
    inode = partial.stat().st_ino
    publish(partial, tmp_path / "out", overwrite)
    assert (tmp_path / "out").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_onto_an_empty_directory(tmp_path, partial):
    (tmp_path / "out").mkdir()
    publish(partial, tmp_path / "out", False)
    assert (tmp_path / "out" / "new").read_text() == "new"


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_publish_refuses_what_exists(tmp_path, partial, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "old").write_text("old")
    elif kind == "file":
        out.write_text("old")
    else:
        out.symlink_to(partial)
    with pytest.raises(ConvertError, match="already exists") as caught:
        publish(partial, out, False)
    assert caught.value.hint and "--overwrite" in caught.value.hint
    assert (partial / "new").exists() and (kind != "directory" or (out / "old").exists())


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_publish_replaces(tmp_path, partial, way, kind):
    out, target = tmp_path / "out", tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    if kind == "directory":
        target.rename(out)
    elif kind == "file":
        out.write_text("old")
    else:
        out.symlink_to(target)
    publish(partial, out, True)
    assert sorted(path.name for path in out.iterdir()) == ["new", "sub"] and not out.is_symlink()
    for replaced in (partial, tmp_path / REPLACED):
        remove(replaced)
    left = {"out"} if kind == "directory" else {"out", "target"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert kind == "directory" or (target / "old").exists()


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, partial, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    monkeypatch.setattr(writer_module, "_exchange", lambda one, other: False)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path == partial:
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        publish(partial, tmp_path / "out", True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
    assert (tmp_path / "out" / "old").exists()
