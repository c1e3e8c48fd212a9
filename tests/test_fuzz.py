"""Random damage: a command does what it should or says why it cannot, whatever its files hold.

Every test runs for seconds with the same inputs each time and, by `make fuzz`, for minutes with new ones.
"""

import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import damage
import numpy as np
import packed_models
import plain_reading
import pytest
import safetensors
import tiny_models
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, VERIFIED
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.cli.main import main
from marlin_convert.errors import ConvertError
from marlin_convert.recipe import load, named_recipes

VOCABULARY = 64
SECONDS = 20
MEGABYTES = 100

PEERS = [
    "gptq-v2-act-order",
    "gptq-8bit",
    "awq",
    "awq-marlin",
    "marlin-24",
    "marlin-24-compressed",
    "compressed-tensors-channel",
    "compressed-tensors-old",
    "compressed-tensors-asymmetric",
]
# what we write, and of which peer
OURS = {"marlin": "gptq", "gptq": "gptq", "compressed-tensors": "gptq", "marlin-24": "gptq-sparse"}

OPTIONS = [
    *([[]] * 3),
    ["--requantize"],
    ["--skip", "*.down_proj"],
    ["--unpruned", "*.down_proj"],
    ["--dtype", "bfloat16"],
    ["--resume"],
]

Dice = random.Random


class TooLong(BaseException):
    """No Exception, so that nothing catches it."""


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.fuzz)])
def runs(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Gives a check random dice, so and so many times in the short and in the long run."""
    long = request.param == "long"

    def run(check: Callable[[Dice], None], *, short: int, many: int) -> None:
        inputs = 0
        _costs.clear()

        def counted(dice: Dice) -> None:
            nonlocal inputs
            inputs += 1
            check(dice)

        count = many if long else short
        limits = settings(
            max_examples=count, derandomize=not long, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        limits(given(st.randoms(use_true_random=False))(counted))()
        seconds, megabytes = (max(costs) for costs in zip(*_costs, strict=True))
        with capsys.disabled():
            print(f" {inputs} inputs, none over {seconds:.1f} s and {megabytes} MB")
        assert inputs >= count

    return run


# What no input may do

_written: list[str] = []
_costs: list[tuple[float, int]] = []  # seconds and megabytes of every input


def _note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _written.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.symlink", "os.link", "os.rename"):
        _written.extend(os.fsdecode(name) for name in arguments[:2] if isinstance(name, str | bytes))


sys.addaudithook(_note_writes)


@contextmanager
def bounded(home: Path) -> Iterator[None]:
    """Fails what takes long, or much memory, or writes elsewhere than in `home`."""

    def stop(*_: object) -> None:
        raise TooLong(f"after {SECONDS} seconds")

    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    gc.unfreeze()  # every command freezes what there is
    before, started = _kilobytes("VmRSS"), time.monotonic()
    _written.clear()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    _costs.append((time.monotonic() - started, (_kilobytes("VmHWM") - before) >> 10))
    assert _costs[-1][1] < MEGABYTES
    elsewhere = [name for name in _written if not Path(name).resolve().is_relative_to(home.resolve())]
    assert not elsewhere


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything lies, with a file that is nobody's business; memory is short there."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((_kilobytes("VmSize") << 10) + (16 * MEGABYTES << 20), hard))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a directory, with what changes when it is changed."""
    found = {}
    for folder, folders, files in os.walk(directory):
        for name in folders + files:
            path = Path(folder, name)
            status = path.lstat()
            written = (status.st_size, status.st_mtime_ns) if name in files else ()
            found[path.relative_to(directory).as_posix()] = (status.st_ino, *written)
    return found


def said(result: Result, *codes: int) -> int:
    """The exit code, one of those that are meant; an error comes with a sentence."""
    assert result.exit_code in codes, result.output
    assert "Traceback" not in result.output
    assert result.output.replace("\n", "").isprintable(), "what is in a file moves the cursor"
    assert result.exit_code != 1 or "\nError: " in f"\n{result.stderr}", result.output
    return result.exit_code


# What is right, read with other code


def check_reading(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Read all as the safetensors library does; the tensors, and the packed weights that make sense."""
    checkpoint = Checkpoint.open(directory)
    assert {info.file for info in checkpoint.tensors.values()} <= set(checkpoint.weight_files)
    tensors = {}
    for path in checkpoint.weight_files:
        for name, entry in safetensors.deserialize(path.read_bytes()):
            tensor = checkpoint.read(name)
            info = checkpoint.tensors[name]
            assert (info.code, list(info.shape)) == (entry["dtype"], entry["shape"])
            assert tensor.flatten().view(torch.uint8).numpy().tobytes() == bytes(entry["data"])
            tensors[name] = tensor
    assert tensors.keys() == checkpoint.tensors.keys()
    weights = Weights(checkpoint)
    found = {}
    for linear in weights.packed_linears():
        try:
            weight = weights.quantized(linear).dequantize().numpy()
        except ConvertError as error:
            note(f"{linear}: {error}")
            continue
        found[linear] = plain_reading.weight(tensors, linear, weights.scheme_of(linear))
        assert np.array_equal(weight, found[linear], equal_nan=True), linear
    return tensors, found


def check_output(
    tensors: dict[str, torch.Tensor],
    packed: dict[str, np.ndarray],
    written: dict[str, torch.Tensor],
    packed_again: dict[str, np.ndarray],
    option: list[str],
) -> None:
    """What was copied or repacked is what it was."""
    if packed and "--requantize" not in option:
        assert packed.keys() == packed_again.keys()
        assert all(np.array_equal(packed[name], packed_again[name]) for name in packed)
    for name in tensors.keys() & written.keys():
        if name.rpartition(".")[0] not in packed_again and "--dtype" not in option:
            assert torch.equal(tensors[name], written[name]), name


def check_manifest(directory: Path) -> None:
    """Every file is as the manifest says, if there is one."""
    if not (directory / MANIFEST).exists():
        return
    files = json.loads((directory / MANIFEST).read_text())["files"]
    for path in directory.rglob("*"):
        if path.is_file() and path.name not in (MANIFEST, VERIFIED):
            content = path.read_bytes()
            entry = files.pop(path.relative_to(directory).as_posix())
            assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert not files


# The inputs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def sources(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of one block: dense, as peers pack them, and as we do (verified, some in shards)."""
    directory = tmp_path_factory.mktemp("sources")
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = Whitespace()
    bpe.train([str(text)], BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>"], limit_alphabet=40))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    found = {"dense": directory / "dense"}
    dense = tiny_models.build("llama", torch.float16, vocab_size=VOCABULARY, num_hidden_layers=1)
    dense.save_pretrained(found["dense"])
    for name in [*PEERS, *set(OURS.values())]:
        found[name] = directory / f"peer-{name}"
        packed_models.make(name, found[name], blocks=1, vocabulary=VOCABULARY)
    for path in found.values():
        tokenizer.save_pretrained(path)
    peers = dict(found)
    for (format, peer), size in zip(OURS.items(), ("5GB", "60KB", "60KB", "5GB"), strict=True):
        found[format] = directory / format
        words = f"quantize {peers[peer]} -o {found[format]} --format {format} --max-shard-size {size}"
        words += " --unpruned *.down_proj" * (format == "marlin-24")
        for command in (words, f"verify {found[format]}"):
            assert CliRunner().invoke(main, command.split()).exit_code == 0
    return found


def spoil(dice: Dice, directory: Path) -> None:
    """Damage one or two files of a model, and make its manifest fit, or take it away, or neither."""
    for _ in range(dice.choice([1, 1, 1, 2])):
        paths = sorted(directory.iterdir())
        read = [
            path for path in paths if path.suffix == ".safetensors" or path.name in ("config.json", MANIFEST)
        ]
        path = dice.choice(3 * read + paths)
        kind = dice.randrange(10)
        if not path.is_file() or path.is_symlink() or dice.randrange(20) == 0:
            damage.directory(dice, directory)
            continue
        note(f"{path.name}, kind {kind}")
        content = path.read_bytes()
        try:
            if path.suffix == ".safetensors" and kind < 6:
                damage.tensors(dice, path)
            elif path.suffix == ".safetensors" and kind < 9:
                path.write_bytes(damage.header(dice, content))
            elif path.suffix == ".json" and kind < 8:
                path.write_bytes(damage.json_text(dice, content))
            else:
                path.write_bytes(damage.data(dice, content))
        except (safetensors.SafetensorError, ValueError, RecursionError):
            path.write_bytes(damage.data(dice, content))  # it was damaged too much before to be taken apart
        if path.suffix == ".json":
            note(path.read_bytes()[:3000].decode(errors="replace"))
    kind = dice.randrange(3)
    if kind == 0 and (directory / MANIFEST).is_file():
        try:
            refresh(directory)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            note("the manifest cannot be made to fit")
    elif kind == 1 and (directory / MANIFEST).is_file():
        (directory / MANIFEST).unlink()


def refresh(directory: Path) -> None:
    """Make the manifest fit the files."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_damaged_checkpoint(runs, sources, text, home, cli):
    model, output, report = home / "model", home / "out", f"model/{VERIFIED}"
    small = ("--samples", 2, "--sequence-length", 16)

    def check(dice: Dice) -> None:
        for path in (model, output, home / "out.partial"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sources[dice.choice(sorted(sources))], model)
        spoil(dice, model)
        json_word = ["--json"] if dice.randrange(2) else []
        before = listing(home)

        def changed() -> set[str]:
            return {name for name, _ in listing(home).items() ^ before.items()}

        with bounded(home):
            source = None
            try:
                source = check_reading(model)
            except ConvertError as error:
                note(f"{error}")
            said(cli("inspect", model, *json_word), 0, 1)
            assert not changed()
            if dice.randrange(2):
                option = dice.choice(OPTIONS)
                words = [
                    "-o",
                    output,
                    "--format",
                    dice.choice(list(OURS)),
                    "--calibration",
                    text,
                    *small,
                    *option,
                ]
                planned = said(cli("quantize", model, *words, "--dry-run", *json_word), 0, 1)
                assert not changed()
                done = said(cli("quantize", model, *words), 0, 1)
                new = {"out"} if done == 0 else {"out.partial"} if planned == 0 else set()
                assert {name.split("/")[0] for name in changed()} <= new
                if done == 0:
                    check_output(*source, *check_reading(output), option)
                    assert said(cli("verify", output, "--checks", "files"), 0) == 0
            else:
                beside = ["--source", sources["dense"], "--text", text, *small]
                words = beside if dice.randrange(4) == 0 else []
                done = said(cli("verify", model, *json_word, *words), 0, 1, 3)
                assert changed() <= {report, f"{report}.tmp", "model"}
                if done == 0:
                    check_manifest(model)

    runs(check, short=250, many=20_000)


def test_a_damaged_recipe(runs, sources, home, cli):
    path = home / "recipe.yaml"
    recipes = [load(name).dump() for name in named_recipes()]

    def check(dice: Dice) -> None:
        text = dice.choice(recipes)
        kind = dice.randrange(4)
        if kind == 0:
            path.write_bytes(damage.json_text(dice, json.dumps(yaml.safe_load(text)).encode()))
        elif kind == 1:
            path.write_bytes(damage.data(dice, text.encode()))
        else:
            path.write_bytes(damage.yaml_text(dice, text))
        note(path.read_bytes()[:3000].decode(errors="replace"))
        words = ["quantize", sources["dense"], "-o", home / "out", "--recipe", path, "--dry-run"]
        with bounded(home):
            try:
                recipe = load(str(path))
            except ConvertError as error:
                note(f"{error}")
                assert said(cli(*words), 1) == 1
                return
            said(cli(*words, *(["--json"] if dice.randrange(2) else [])), 0, 1)
            path.write_text(recipe.dump())
            assert load(str(path)) == recipe

    runs(check, short=150, many=5_000)
