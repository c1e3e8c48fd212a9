"""Runs that are stopped, by kill -9, Ctrl-C or a full disk, and go on to the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch

from marlin_convert import quantize as story
from marlin_convert.checkpoint.unfinished import UnfinishedRun
from marlin_convert.errors import ConvertError
from marlin_convert.hub import Source
from marlin_convert.recipe import Recipe

BLOCKS = 4

# Starts a process for every line it is given, without importing torch each time; kills it where it is told.
STARTER = """
import importlib, json, os, signal, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from marlin_convert import calibration, estimate, quantize, report
from marlin_convert.cli import main

def kill_at(place, call):
    module, name = place.split(":")
    holder = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    function, calls = getattr(holder, name), 0
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == abs(call) and call < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(holder, name, counted)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        os.dup2(1, 2)
        if order["kill"]:
            kill_at(*order["kill"])
        main(order["words"])
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

Start = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs a command line in a process of its own, killed before (-n) or after (n) a function's n-th call."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout

        def run(*words: object, kill: tuple[str, int] | None = None) -> tuple[int, str]:
            order = {"words": [str(word) for word in words], "kill": kill, "log": str(log)}
            print(json.dumps(order), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            return status, log.read_text()

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def words(tinypy: Path, text: Path) -> list[object]:
    return [
        "quantize", tinypy, "--calibration", text, "--samples", 4, "--sequence-length", 128,
        "--device", "cpu", "--max-shard-size", "1500KB",
    ]  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(start: Start, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    status, log = start(*words, "-o", output)
    assert status == 0, log
    assert len([name for name in contents(output) if name.endswith(".safetensors")]) > 1
    return contents(output)


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def blocks_done(output: Path) -> int:
    try:
        return json.loads((partial(output) / "progress.json").read_text())["done"]["blocks"]
    except FileNotFoundError:
        return 0


def check_finished(output: Path, whole: dict[str, bytes]) -> None:
    assert contents(output) == whole
    assert {path.name for path in output.parent.iterdir()} == {output.name}


PROGRESS, COPY = ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 3), ("shutil:copyfile", -1)


def test_killed_twice_it_goes_on_to_the_same_bytes(
    start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    status, log = start(*words, "-o", output, kill=PROGRESS)
    assert status == -signal.SIGKILL, log
    assert not output.exists()
    assert blocks_done(output) == 2
    status, log = start(*words, "-o", output)
    assert status == 1 and "--resume" in log
    status, log = start(*words, "-o", output, "--resume", kill=COPY)
    assert status == -signal.SIGKILL, log
    assert "resuming at block 2" in log
    assert blocks_done(output) == BLOCKS and not output.exists()
    status, log = start(*words, "-o", output, "--resume")
    assert status == 0, log
    assert f"resuming at block {BLOCKS}" in log
    check_finished(output, whole)


PLACES = [
    ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", -1),
    ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 1),
    ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", -2),
    ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 5),
    ("marlin_convert.checkpoint.writer:ShardWriter._put", 1),
    ("marlin_convert.checkpoint.writer:ShardWriter._put", 30),
    ("marlin_convert.checkpoint.writer:ShardWriter._put", -45),
    ("marlin_convert.checkpoint.writer:ShardWriter._finish", -1),
    ("marlin_convert.checkpoint.writer:ShardWriter._finish", 1),
    ("marlin_convert.checkpoint.writer:ShardWriter._finish", 3),
    ("marlin_convert.checkpoint.writer:ShardWriter.close", -1),
    ("marlin_convert.checkpoint.writer:ShardWriter.close", 1),
    ("os:fsync", 4),
    ("os:fsync", -9),
    ("shutil:copyfile", 2),
    ("marlin_convert.quantize:publish", -1),
    ("marlin_convert.quantize:publish", 1),
]


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].rpartition(':')[2]}{place[1]:+}")
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    place: tuple[str, int], start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    status, log = start(*words, "-o", output, kill=place)
    assert status == -signal.SIGKILL, log
    done = blocks_done(output)
    status, log = start(*words, "-o", output, "--resume")
    assert status == 0, log
    assert not done or f"resuming at block {done}" in log or "publish" in place[0]
    check_finished(output, whole)


@pytest.mark.faults
@pytest.mark.parametrize("call", [-1, 1])
def test_killed_while_it_replaces_an_output_the_new_one_comes_in_the_end(
    call: int, start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert start(*words, "-o", output, "--seed", 5)[0] == 0
    earlier = contents(output)
    place = ("marlin_convert.checkpoint.writer:_exchange", call)
    status, log = start(*words, "-o", output, "--overwrite", kill=place)
    assert status == -signal.SIGKILL, log
    assert contents(output) == (earlier if call < 0 else whole)
    status, log = start(*words, "-o", output, "--overwrite", "--resume")
    assert status == 0, log
    check_finished(output, whole)


@pytest.mark.faults
def test_killed_at_random_moments_again_and_again(words: list[object], tmp_path: Path) -> None:
    """Whole processes with two threads each, killed wherever they are."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "marlin_convert", *map(str, words)]
    started = time.monotonic()
    subprocess.run([*command, "-o", tmp_path / "whole"], check=True, env=environment, capture_output=True)
    usual = time.monotonic() - started
    whole = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    chance = random.Random(20)
    kills, went_on, output = 0, set(), tmp_path / "out"
    while kills < 15 or output.exists() or partial(output).exists():
        if output.exists() and not partial(output).exists():  # killed with everything done, or not at all
            check_finished(output, whole)
            shutil.rmtree(output)
            continue
        done = blocks_done(output)
        with subprocess.Popen(
            [*command, "-o", output, "--resume"], env=environment, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            if kills < 15:
                if chance.random() < 0.5:  # somewhere in the whole, or soon after a block is done
                    deadline = time.monotonic() + usual * chance.uniform(0.3, 1.0)
                    while time.monotonic() < deadline and process.poll() is None:
                        time.sleep(0.005)
                else:
                    target = min(blocks_done(output) + chance.randint(1, 2), BLOCKS)
                    while blocks_done(output) < target and process.poll() is None:
                        time.sleep(0.002)
                    time.sleep(chance.uniform(0, 0.05))
            if kills < 15 and process.poll() is None:
                process.kill()
                kills += 1
            assert process.stderr
            log = process.stderr.read()
        if done and "resuming at block" in log:
            assert f"resuming at block {done}\n" in log
            went_on.add(done)
        assert process.returncode in (0, -signal.SIGKILL), log
        assert output.exists() or process.returncode
    assert len(went_on) > 1


@pytest.mark.parametrize("early", [pytest.param(True, marks=pytest.mark.faults), False])
def test_ctrl_c(
    early: bool, start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Before a block is done nothing is left; after one, what --resume goes on with."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "marlin_convert", *map(str, words), "-o", str(output)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # tests that run in the background inherit a SIGINT that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None:
            if partial(output).is_dir() if early else blocks_done(output):
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.002)
        _, log = process.communicate()
    assert process.returncode == 130, log
    assert "Interrupted." in log and "Traceback" not in log
    assert not output.exists()
    if partial(output).exists():  # of the early one too, where the first block was quick
        assert blocks_done(output)
    status, log = start(*words, "-o", output, "--resume")
    assert status == 0, log
    assert early or "resuming at block" in log
    check_finished(output, whole)


class Stopped(Exception):
    """What ends a run of these tests."""


def job(tinypy: Path, output: Path, text: Path, **changes: object) -> story.Job:
    recipe = Recipe(samples=4, sequence_length=128, calibration=str(text))
    settings = {name: changes.pop(name) for name in list(changes) if hasattr(recipe, name)}
    source = Source(Path(str(changes.pop("source", tinypy))), "tinypy-4m", None)
    return story.Job(
        source, output, recipe.changed(settings), torch.device("cpu"),
        **{"max_shard_size": 1_500_000, **changes},
    )  # fmt: skip


def stop_after(blocks: int, then: Callable[[], None] | None = None) -> Callable[[range, int], Iterable[int]]:
    """Lets so many blocks through."""

    def progress(numbers: range, total: int) -> Iterator[int]:
        for number in numbers:
            if number == blocks:
                if then is None:
                    raise Stopped
                then()
            yield number

    return progress


@pytest.fixture
def stopped(tinypy: Path, text: Path, tmp_path: Path) -> Path:
    """The output of a run that was stopped after two of four blocks."""
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        story.quantize(job(tinypy, output, text), stop_after(2))
    assert blocks_done(output) >= 1
    return output


def copy_of(model: Path, directory: Path) -> Path:
    """The same model in other files, a moment later."""
    shutil.copytree(model, directory)
    later = (model / "model.safetensors").stat().st_mtime + 10
    os.utime(directory / "model.safetensors", (later, later))
    return directory


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "recipe.seed 0, not 1"),
        ({"group_size": 64}, "recipe.group_size 128, not 64"),
        ({"format": "gptq"}, "recipe.format 'marlin', not 'gptq'"),
        ({"samples": 5}, "recipe.samples 4, not 5"),
        ({"skip": ("*.down_proj",)}, "recipe.skip"),
        ({"max_shard_size": 10**9}, "max_shard_size 1500000, not 1000000000"),
        ({"source": "copy"}, "source.fingerprint"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_named(
    changes: dict, named: str, stopped: Path, tinypy: Path, text: Path
) -> None:
    if "source" in changes:
        changes = {"source": copy_of(tinypy, stopped.with_name("copy"))}
    before = contents(partial(stopped))
    with pytest.raises(ConvertError, match="cannot resume") as refused:
        story.quantize(job(tinypy, stopped, text, resume=True, **changes))
    assert named in str(refused.value)
    assert refused.value.hint
    assert contents(partial(stopped)) == before
    assert not stopped.exists()


def test_another_text_of_the_same_name_is_not_resumed_either(stopped: Path, tinypy: Path, text: Path) -> None:
    text = Path(shutil.copyfile(text, stopped.parent / text.name))
    text.write_text("other words, " + text.read_text())
    with pytest.raises(ConvertError, match="cannot resume"):
        story.quantize(job(tinypy, stopped, text, resume=True))


def test_an_unfinished_run_is_not_thrown_away_unasked(stopped: Path, tinypy: Path, text: Path) -> None:
    before = contents(partial(stopped))
    with pytest.raises(ConvertError, match="holds an interrupted run") as refused:
        story.quantize(job(tinypy, stopped, text))
    assert "--resume" in (refused.value.hint or "")
    assert contents(partial(stopped)) == before


def test_with_nothing_to_resume_it_starts_afresh(
    tinypy: Path, text: Path, tmp_path: Path, whole: dict[str, bytes], start: Start, words: list[object]
) -> None:
    status, log = start(*words, "-o", tmp_path / "out", "--resume")
    assert status == 0 and "resuming" not in log
    check_finished(tmp_path / "out", whole)


def test_a_directory_that_is_no_unfinished_run_is_not_touched(
    tinypy: Path, text: Path, tmp_path: Path
) -> None:
    other = partial(tmp_path / "out")
    other.mkdir()
    (other / "thesis.txt").write_text("four years of work")
    for resume in (False, True):
        with pytest.raises(ConvertError, match="is in the way") as refused:
            story.quantize(job(tinypy, tmp_path / "out", text, resume=resume, overwrite=True))
        assert refused.value.hint
    assert contents(other) == {"thesis.txt": b"four years of work"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 7 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", place], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_disk_that_fills_up(
    small_disk: Path, tinypy: Path, text: Path, whole: dict[str, bytes], start: Start, words: list[object]
) -> None:
    source, output = contents(tinypy), small_disk / "out"
    output.mkdir()
    (output / "earlier.txt").write_text("an earlier output")
    with pytest.raises(ConvertError, match="no space left") as refused:
        story.quantize(job(tinypy, output, text, overwrite=True), stop_after(2, lambda: fill(small_disk)))
    assert "--resume" in (refused.value.hint or "")
    assert contents(tinypy) == source
    assert contents(output) == {"earlier.txt": b"an earlier output"}
    assert blocks_done(output) == 2
    (small_disk / "filler").unlink()
    status, log = start(*words, "-o", output, "--resume", "--overwrite")
    assert status == 0, log
    assert "resuming at block 2" in log
    check_finished(output, whole)


def test_a_disk_full_from_the_start(small_disk: Path, start: Start, words: list[object]) -> None:
    fill(small_disk)
    (small_disk / "filler").open("r+b").truncate(6_000_000)
    status, log = start(*words, "-o", small_disk / "out")
    assert status == 1
    assert "Error: no space left" in log and "Hint: " in log and "Traceback" not in log
    assert {path.name for path in small_disk.iterdir()} == {"filler"}


def test_a_disk_that_fills_up_while_the_hidden_states_go_to_a_file(
    small_disk: Path, tinypy: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file on a full disk kills the process, unless its space was taken before."""
    from marlin_convert.models import hidden

    monkeypatch.setattr(hidden, "free_memory", lambda device: 0)
    fill(small_disk)
    (small_disk / "filler").open("r+b").truncate(7 * 2**20 - 4_000_000)
    longer = small_disk.with_name("longer.txt")
    longer.write_text(4 * text.read_text())
    with pytest.raises(ConvertError, match="no space left"):
        story.quantize(job(tinypy, small_disk / "out", longer, samples=96))
    assert {path.name for path in small_disk.iterdir()} == {"filler"}


def test_another_process_at_work_is_left_alone(tinypy: Path, text: Path, tmp_path: Path) -> None:
    """Also before its first block is finished, when there is nothing yet that a resume could use."""
    output = tmp_path / "out"
    other = UnfinishedRun(output)
    other.begin({}, {"blocks": 0, "tensors": 0, "linears": []})
    (other.staging / "model.safetensors").write_bytes(b"begun")
    with pytest.raises(ConvertError, match="another process is at work"):
        story.quantize(job(tinypy, output, text))
    assert (other.staging / "model.safetensors").read_bytes() == b"begun"
    other.release()
    story.quantize(job(tinypy, output, text))
    assert output.is_dir() and not other.directory.exists()
