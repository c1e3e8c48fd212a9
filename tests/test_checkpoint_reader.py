"""Checkpoints built by hand, valid ones and ones meant to break the reader."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.reader import DTYPES, Checkpoint
from marlin_convert.errors import SourceError

F16_PAIR = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


def stored(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def model(directory: Path, content: bytes, name: str = "model.safetensors", config: object = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    (directory / name).write_bytes(content)
    return directory


def sharded(directory: Path, shards: dict[str, list[str]], weight_map: dict[str, str]) -> Path:
    """Shards of one-element float16 tensors, and an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    for file, names in shards.items():
        header = {
            name: {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]}
            for i, name in enumerate(names)
        }
        (directory / file).write_bytes(stored(header, bytes(2 * len(names))))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def refused(directory: Path, *words: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        Checkpoint.open(directory)
    for word in words:
        assert word in str(caught.value)
    return caught.value


# Reading


def test_reads_every_dtype_and_shape_that_the_library_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for code, (name, _) in DTYPES.items():
        dtype = getattr(torch, name)
        if code == "F8_E8M0":  # the library (0.8) has no torch name for it
            continue
        raw = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[code] = (raw % 2 if code == "BOOL" else raw).view(dtype).clone()
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 7, dtype=torch.bfloat16)
    model(tmp_path, b"")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.quantization_config is None
    assert checkpoint.weight_files == [tmp_path / "model.safetensors"]
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
        assert tensor.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))
        assert checkpoint.tensors[name].shape == tuple(expected.shape)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {
        "late": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
        "early": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
    }
    content = stored(header, bytes(8))
    checkpoint = Checkpoint.open(model(tmp_path, content))
    assert list(checkpoint.tensors) == ["early", "late"]
    info = checkpoint.tensors["late"]
    assert (info.start, info.end, info.file) == (
        len(content) - 4,
        len(content),
        tmp_path / "model.safetensors",
    )


def test_reading_twice_gives_memory_of_its_own(tmp_path):
    checkpoint = Checkpoint.open(model(tmp_path, stored({"w": F16_PAIR}, bytes(4))))
    first = checkpoint.read("w")
    first.fill_(1)
    assert checkpoint.read("w").eq(0).all()


def test_several_threads_may_read(tmp_path):
    model(tmp_path, b"")
    save_file({f"w{i}": torch.full((1000,), i) for i in range(20)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(i for i in range(20) for _ in range(5) if not checkpoint.read(f"w{i}").eq(i).all())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reads_shards(tmp_path):
    names = {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]}
    weight_map = {name: file for file, group in names.items() for name in group}
    checkpoint = Checkpoint.open(sharded(tmp_path, names, weight_map))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [path.name for path in checkpoint.weight_files] == list(names)


def test_a_file_truncated_after_opening_is_refused_on_read(tmp_path):
    checkpoint = Checkpoint.open(model(tmp_path, stored({"w": F16_PAIR}, bytes(4))))
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(SourceError, match="1 bytes early in tensor 'w'"):
        checkpoint.read("w")


# Which files


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model.safetensors"])
def test_a_single_file_may_have_another_name(tmp_path, name):
    directory = model(tmp_path, stored({"w": F16_PAIR}, bytes(4)), name)
    (tmp_path / "._hidden.safetensors").write_bytes(b"")
    assert Checkpoint.open(directory).weight_files == [tmp_path / name]


def test_an_index_may_have_another_name(tmp_path):
    sharded(tmp_path, {"gptq-1.safetensors": ["a"]}, {"a": "gptq-1.safetensors"})
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "gptq.safetensors.index.json")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]


def test_several_unindexed_files_are_refused(tmp_path):
    model(tmp_path, stored({"w": F16_PAIR}, bytes(4)), "one.safetensors")
    model(tmp_path, stored({"w": F16_PAIR}, bytes(4)), "two.safetensors")
    refused(tmp_path, "2 safetensors files", "one.safetensors, two.safetensors")


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    sharded(tmp_path, {"s.safetensors": ["a"]}, {"a": "s.safetensors"})
    model(tmp_path, stored({"w": F16_PAIR}, bytes(4)))
    refused(tmp_path, "both model.safetensors and an index")


def test_pickle_is_refused_with_a_way_out(tmp_path):
    error = refused(model(tmp_path, b"", "pytorch_model.bin"), "pickle", "pytorch_model.bin")
    assert error.hint and "safetensors" in error.hint


def test_no_weights_no_config_no_directory(tmp_path):
    refused(tmp_path / "absent", "not a directory")
    assert refused(tmp_path, "no config.json").hint
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no weights")
    nested = '{"a": ' + "[" * 100 + "]" * 100 + "}"
    for text in ("{", "[1]", "\udcff", "[" * 100_000, nested, '{"a": "\\ud800"}', '{"\\udfff": 1}'):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        refused(tmp_path, "config.json")


def test_a_huge_json_file_is_not_read(tmp_path):
    directory = model(tmp_path, stored({"w": F16_PAIR}, bytes(4)))
    os.truncate(directory / "config.json", 1 << 40)
    refused(directory, "config.json", "1099511627776 bytes")


def test_quantization_config_is_looked_for_as_engines_do(tmp_path):
    model(tmp_path, stored({"w": F16_PAIR}, bytes(4)))
    (tmp_path / "quant_config.json").write_text('{"from": "quant"}')
    assert Checkpoint.open(tmp_path).quantization_config == {"from": "quant"}
    (tmp_path / "quantize_config.json").write_text('{"from": "quantize"}')
    assert Checkpoint.open(tmp_path).quantization_config == {"from": "quantize"}
    (tmp_path / "config.json").write_text('{"quantization_config": {"from": "config"}}')
    assert Checkpoint.open(tmp_path).quantization_config == {"from": "config"}
    (tmp_path / "config.json").write_text('{"quantization_config": "gptq"}')
    refused(tmp_path, "quantization_config")


# Headers meant to break a reader

PAIR_AT = {"dtype": "F16", "shape": [2]}
ATTACKS = {
    "empty file": (b"", "truncated"),
    "shorter than a length": (b"\x01\0\0", "truncated"),
    "length beyond the file": (stored({}, length=3), "2"),
    "huge length": (stored({}, length=2**64 - 1), "18446744073709551615"),
    "not an object": (stored(b"[]"), "not JSON"),
    "not JSON": (stored(b"{]"), "invalid JSON"),
    "not UTF-8": (stored(b'{"\xff":1}'), "invalid JSON"),
    "deeply nested": (stored(b'{"a":' * 100_000), "invalid JSON"),
    "absurd integer": (stored(b'{"w":' + b"9" * 5000 + b"}"), "invalid JSON"),
    "duplicate tensor": (
        stored(b'{"w":%b,"w":%b}' % ((json.dumps(F16_PAIR).encode(),) * 2), bytes(4)),
        "twice",
    ),
    "duplicate key in a tensor": (
        stored(b'{"w":{"dtype":"F16","dtype":"I8","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        "'dtype' is there twice",
    ),
    "metadata not text": (stored({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (stored({"__metadata__": []}), "__metadata__"),
    "tensor not an object": (stored({"w": 3}), "object"),
    "unknown dtype": (stored({"w": F16_PAIR | {"dtype": "F4"}}, bytes(4)), "dtype 'F4'"),
    "a name that is no text": (stored(b'{"\\ud800":{}}'), "surrogates"),
    "a name that moves the cursor": (stored({"\x1b[2Jw": F16_PAIR}, bytes(4)), "not a name"),
    "not UTF-8 but UTF-16": (stored('{"w":1}'.encode("utf-16-le")), "invalid JSON"),
    "dtype a list": (stored({"w": F16_PAIR | {"dtype": ["F16"]}}, bytes(4)), "dtype"),
    "no shape": (stored({"w": {"dtype": "F16", "data_offsets": [0, 4]}}, bytes(4)), "object of"),
    "something else": (stored({"w": F16_PAIR | {"strides": [1]}}, bytes(4)), "object of"),
    "negative sizes": (stored({"w": F16_PAIR | {"shape": [-1, -2]}}, bytes(4)), "shape [-1, -2]"),
    "fractional size": (stored({"w": F16_PAIR | {"shape": [2.0]}}, bytes(4)), "shape [2.0]"),
    "boolean size": (stored({"w": F16_PAIR | {"shape": [True, 2]}}, bytes(4)), "shape"),
    "wrapping shape": (stored({"w": F16_PAIR | {"shape": [2**32, 2**32]}}, bytes(4)), "shape"),
    "empty but wrapping": (
        stored({"w": {"dtype": "F16", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
        "shape",
    ),
    "too many dimensions": (stored({"w": F16_PAIR | {"shape": [2] + [1] * 64}}, bytes(4)), "shape"),
    "one offset": (stored({"w": PAIR_AT | {"data_offsets": [4]}}, bytes(4)), "data_offsets"),
    "negative offset": (stored({"w": PAIR_AT | {"data_offsets": [-4, 0]}}, bytes(4)), "data_offsets"),
    "reversed offsets": (stored({"w": PAIR_AT | {"data_offsets": [4, 0]}}, bytes(4)), "takes 4 bytes"),
    "offsets of another size": (stored({"w": PAIR_AT | {"data_offsets": [0, 6]}}, bytes(6)), "takes 4 bytes"),
    "hole at the beginning": (stored({"w": PAIR_AT | {"data_offsets": [2, 6]}}, bytes(6)), "hole"),
    "hole between": (
        stored({"w": F16_PAIR, "v": PAIR_AT | {"data_offsets": [6, 10]}}, bytes(10)),
        "hole before tensor 'v'",
    ),
    "overlap": (
        stored({"w": F16_PAIR, "v": PAIR_AT | {"data_offsets": [2, 6]}}, bytes(6)),
        "overlapping bytes before tensor 'v'",
    ),
    "same bytes twice": (stored({"w": F16_PAIR, "v": F16_PAIR}, bytes(4)), "overlapping"),
    "truncated": (stored({"w": F16_PAIR}, bytes(3)), "truncated"),
    "too long": (stored({"w": F16_PAIR}, bytes(5)), "too long"),
    "nothing described": (stored({}, bytes(1)), "too long"),
    "far beyond the file": (stored({"w": PAIR_AT | {"data_offsets": [2**50, 2**50 + 4]}}, bytes(4)), "hole"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_the_header_are_refused(tmp_path, attack):
    content, word = ATTACKS[attack]
    assert "model.safetensors" in str(refused(model(tmp_path, content), word))


def test_a_terminal_cannot_be_attacked_through_a_name(tmp_path):
    content = stored({"\x1b[2Jw": F16_PAIR | {"dtype": "F4"}}, bytes(4))
    assert "\x1b" not in str(refused(model(tmp_path, content)))


def test_damaged_files_are_refused_and_nothing_worse(tmp_path):
    """Whatever single damage a file has, it is read as the library would, or refused."""
    path = model(tmp_path, b"") / "model.safetensors"
    save_file({"a": torch.arange(6).view(2, 3), "b": torch.ones(3, dtype=torch.float16)}, path)
    good = path.read_bytes()
    dice = random.Random(0)
    accepted = 0
    for _ in range(1500):
        bad = bytearray(good)
        bad[dice.randrange(len(bad) - 54)] = dice.choice(b' "0123456789[]{},:aF\x00\xff')
        path.write_bytes(bad)
        try:
            checkpoint = Checkpoint.open(tmp_path)
        except SourceError:
            continue
        accepted += 1
        library = load_file(path)
        assert library.keys() == checkpoint.tensors.keys()
        assert all(checkpoint.read(name).equal(library[name]) for name in library)
    assert 0 < accepted < 1500


# Indexes meant to break a reader


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "sub/w.safetensors",
        "sub\\w.safetensors",
        "/etc/hostname",
        "{tmp}/outside.safetensors",
        "..",
        "",
        "config.json",
        "./model.safetensors",
        3,
        None,
    ],
)
def test_shards_must_be_plain_names(tmp_path, file):
    (tmp_path / "outside.safetensors").write_bytes(stored({"a": F16_PAIR}, bytes(4)))
    if isinstance(file, str):
        file = file.format(tmp=tmp_path)
    refused(sharded(tmp_path / "m", {}, {"a": file}), "not a plain file name", "'a'")


@pytest.mark.parametrize("file", ["x" * 300 + ".safetensors", "a\0b.safetensors", ".hidden.safetensors"])
def test_shards_that_are_not_there_are_named(tmp_path, file):
    refused(sharded(tmp_path, {"s.safetensors": ["b"]}, {"a": file, "b": "s.safetensors"}), "1 of 2 shards")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_without_a_map_is_refused(tmp_path, text):
    sharded(tmp_path, {}, {})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json")


def test_an_index_that_lists_a_tensor_twice_is_refused(tmp_path):
    sharded(tmp_path, {"s.safetensors": ["a"]}, {})
    text = '{"weight_map": {"a": "s.safetensors", "a": "s.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "'a' is there twice")


def test_missing_tensors_are_named_and_counted(tmp_path):
    weight_map = dict.fromkeys(["w", "a", "b", "c", "d"], "s.safetensors")
    error = refused(sharded(tmp_path, {"s.safetensors": ["w"]}, weight_map))
    assert "tensors listed in the index but not stored (4): 'a', 'b', 'c' and 1 more." in str(error)


def test_foreign_tensors_are_named(tmp_path):
    error = refused(sharded(tmp_path, {"s.safetensors": ["w", "x"]}, {"w": "s.safetensors"}))
    assert "tensors stored but not in the index (1): 'x' in 's.safetensors'." in str(error)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    shards = {"1.safetensors": ["w", "a"], "2.safetensors": ["w"]}
    error = refused(
        sharded(tmp_path, shards, {"w": "1.safetensors", "a": "1.safetensors"} | {"w": "2.safetensors"})
    )
    assert "stored in two shards (1): 'w'" in str(error)


# Links


def test_a_link_leading_out_is_refused(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(stored({"w": F16_PAIR}, bytes(4)))
    directory = model(tmp_path / "m", b"")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(outside)
    refused(directory, "link leading out")
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    refused(directory, "not a regular file")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("model.safetensors")
    refused(directory)


def test_a_config_leading_out_is_refused(tmp_path):
    directory = model(tmp_path / "m", stored({"w": F16_PAIR}, bytes(4)))
    (directory / "config.json").rename(tmp_path / "config.json")
    (directory / "config.json").symlink_to("../config.json")
    refused(directory, "link leading out")


def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path):
    home = tmp_path / "models--a--b"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (blobs / "2").write_bytes(stored({"w": F16_PAIR}, bytes(4)))
    (blobs / "3").write_text("{}")
    for name, blob in ("config.json", "1"), ("model.safetensors", "2"), ("tokenizer.json", "3"):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.read("w").shape == (2,)
    assert checkpoint.companions() == ["tokenizer.json"]
    (tmp_path / "elsewhere").write_bytes((blobs / "2").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere")
    refused(snapshot, "link leading out")


def test_a_directory_may_itself_be_a_link(tmp_path):
    model(tmp_path / "m", stored({"w": F16_PAIR}, bytes(4)))
    (tmp_path / "link").symlink_to("m")
    assert Checkpoint.open(tmp_path / "link").read("w").shape == (2,)


# What goes along


def test_companions(tmp_path):
    model(tmp_path / "m", stored({"w": F16_PAIR}, bytes(4)))
    carried = [
        "LICENSE",
        "License-2.txt",
        "NOTICE.md",
        "USE_POLICY.md",
        "added_tokens.json",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    left = [
        "README.md",
        "tokenizer.py",
        "tokenization_x.py",
        "LICENSE.py",
        "notice.bin",
        ".tokenizer.json",
        ".hidden.tiktoken",
        "modeling.py",
        "training_args.bin",
        "config.json.bak",
        "additional_chat_templates/readme.md",
        "license\n",
        "license\udcff",
    ]
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "licenses").mkdir()
    for name in carried + left:
        (tmp_path / "m" / name).write_text("x")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "m" / "LICENSE.link").symlink_to("../secret")
    (tmp_path / "m" / "NOTICE.loop").symlink_to("NOTICE.loop")
    assert Checkpoint.open(tmp_path / "m").companions() == sorted(carried)


def test_fingerprint_tells_sources_apart(tmp_path):
    content = stored({"w": F16_PAIR}, bytes(4))
    path = model(tmp_path, content) / "model.safetensors"
    os.utime(path, ns=(1, 1))
    first = Checkpoint.open(tmp_path).fingerprint()
    assert Checkpoint.open(tmp_path).fingerprint() == first and len(first) == 64
    os.utime(path, ns=(1, 2))
    other_time = Checkpoint.open(tmp_path).fingerprint()
    path.write_bytes(stored({"v": F16_PAIR}, bytes(4)))
    os.utime(path, ns=(1, 1))
    other_header = Checkpoint.open(tmp_path).fingerprint()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert Checkpoint.open(tmp_path).fingerprint() == first
    (tmp_path / "config.json").write_text("{}")
    other_config = Checkpoint.open(tmp_path).fingerprint()
    path.rename(tmp_path / "other.safetensors")
    other_name = Checkpoint.open(tmp_path).fingerprint()
    assert len({first, other_time, other_header, other_config, other_name}) == 5
