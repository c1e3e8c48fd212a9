"""Runs that are stopped, by kill -9, Ctrl-C or a full disk, and go on to the same bytes."""

import errno
import fcntl
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
from unittest.mock import Mock

import pytest
import tiny_models
import torch
from runs import Start, blocks_done, contents, earlier_output, partial, starter

from marlin_convert.checkpoint import writer
from marlin_convert.checkpoint.unfinished import UnfinishedRun
from marlin_convert.commands import quantize as story
from marlin_convert.errors import ConvertError
from marlin_convert.hub import Source
from marlin_convert.recipe import Recipe

BLOCKS = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs a command line in a process of its own."""
    with starter(tmp_path_factory.mktemp("log")) as start:
        yield start


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def words(tinypy: Path, text: Path) -> list[object]:
    return [
        "quantize", tinypy, "--calibration", text, "--samples", 4, "--sequence-length", 128,
        "--device", "cpu", "--max-shard-size", "1500KB",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(start: Start, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    status, log = start(*words, "-o", output)
    assert status == 0, log
    assert len([name for name in contents(output) if name.endswith(".safetensors")]) > 1
    return contents(output)


def check_finished(output: Path, whole: dict[str, bytes]) -> None:
    assert contents(output) == whole
    assert {path.name for path in output.parent.iterdir()} == {output.name}


PROGRESS = ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 3)
COPY = ("marlin_convert.assemble:reading", -1)


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
    ("marlin_convert.assemble:reading", 2),
    ("marlin_convert.commands.quantize:publish", -1),
    ("marlin_convert.commands.quantize:publish", 1),
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
@pytest.mark.parametrize("call, moved", [(-1, False), (1, False), (1, True)])
def test_killed_while_it_replaces_an_output_the_new_one_comes_in_the_end(
    call: int, moved: bool, start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Also when it was moved away: the earlier one is in its place, and only the numbers in it differ."""
    output = tmp_path / "out"
    assert start(*words, "-o", output, "--seed", 5)[0] == 0
    earlier = contents(output)
    place = ("marlin_convert.checkpoint.writer:_exchange", call)
    status, log = start(*words, "-o", output, "--overwrite", kill=place)
    assert status == -signal.SIGKILL, log
    assert contents(output) == (earlier if call < 0 else whole)
    if moved:
        output.rename(tmp_path.with_name("moved"))
    status, log = start(*words, "-o", output, "--overwrite", "--resume")
    assert status == 0, log
    check_finished(output, whole)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.faults)])
def test_killed_at_random_moments_again_and_again(
    kills: int, words: list[object], quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """With two threads each."""
    chance = random.Random(20)
    repack = f"quantize {quantized('marlin')} --format gptq --device cpu --max-shard-size 1500KB".split()
    with starter(tmp_path, OMP_NUM_THREADS="2") as start:
        for number, command in enumerate((words, repack)):
            directory = tmp_path / str(number)
            directory.mkdir()
            went_on = kill_again_and_again(start, command, directory / "out", kills, chance)
            assert kills < 10 or len(went_on) > 1


def kill_again_and_again(
    start: Start, words: list[object], output: Path, kills: int, chance: random.Random
) -> set[int]:
    """The blocks with which a run was gone on with."""
    started = time.monotonic()
    status, log = start(*words, "-o", output)
    assert status == 0, log
    usual = time.monotonic() - started
    whole, went_on, finished = contents(output), set(), True
    while kills or not finished:
        if finished:
            check_finished(output, whole)
            shutil.rmtree(output)
        done = blocks_done(output)
        seconds = chance.uniform(0.001, usual) if kills else None
        status, log = start(*words, "-o", output, "--resume", seconds=seconds)
        assert status in (0, -signal.SIGALRM), log
        kills -= status != 0
        if "resuming at block" in log:
            assert f"resuming at block {done}\n" in log
            went_on.add(done)
        # what is left after progress.json is an empty directory
        finished = output.exists() and not (partial(output) / "progress.json").exists()
        if finished:
            shutil.rmtree(partial(output), ignore_errors=True)
    check_finished(output, whole)
    return went_on


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


def test_stopped_between_two_renames_the_earlier_output_comes_back(
    tinypy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names cannot be exchanged there is no output for a moment."""
    output, rename = tmp_path / "out", Path.rename
    earlier = earlier_output(output)

    def stop(path: Path, target: Path) -> Path:
        if path.name == "checkpoint":
            raise Stopped
        return rename(path, target)

    monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Path, "rename", stop)
        story.quantize(job(tinypy, output, text, overwrite=True))
    assert not output.exists()
    with pytest.raises(Stopped):
        story.quantize(job(tinypy, output, text, overwrite=True), stop_after(0))
    assert contents(output) == earlier
    assert not partial(output).exists()
    story.quantize(job(tinypy, output, text, overwrite=True))
    assert (output / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_a_kill_leaves_of_a_replaced_output_goes_with_the_next_run(
    start: Start, words: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Its removal comes after five others, of what there is not."""
    output = tmp_path / "out"
    for number in range(2):
        earlier_output(output)
        place = ("marlin_convert.checkpoint.unfinished:remove", -6)
        status, log = start(*words, "-o", output, "--overwrite", kill=place)
        assert status == -signal.SIGKILL, log
        assert contents(output) == whole
        assert (partial(output) / "checkpoint" / "earlier.txt").exists()
        if number:  # with the new output moved away
            output.rename(tmp_path / "elsewhere")
            status, log = start(*words, "-o", output)
            assert status == 0, log
            assert contents(output) == whole
        else:
            status, log = start(*words, "-o", output)
            assert status == 1 and "already exists" in log
        assert not partial(output).exists()
        shutil.rmtree(output)


def test_a_report_that_could_not_be_written_is_written_by_a_resume(
    tinypy: Path, text: Path, tmp_path: Path
) -> None:
    output, report = tmp_path / "out", tmp_path / "absent" / "report.html"
    with pytest.raises(ConvertError, match="the report cannot be written") as refused:
        story.quantize(job(tinypy, output, text, report=report))
    assert "--resume" in (refused.value.hint or "")
    finished = contents(output)
    report.parent.mkdir()
    story.quantize(job(tinypy, output, text, report=report, resume=True), stop_after(0))
    assert "model.layers.0" in report.read_text()
    assert contents(output) == finished and not partial(output).exists()


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
        ({"group_size": 64}, "recipe.group_size 'auto', not 64"),
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


def test_threads_are_named_where_bytes_depend_on_them(
    start: Start,
    words: list[object],
    whole: dict[str, bytes],
    quantized: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """What is solved on a CPU does, and is not gone on with by others; what is repacked does not."""
    output = tmp_path / "out"
    repack = f"quantize {quantized('marlin')} --format gptq --device cpu --max-shard-size 1500KB -o".split()
    status, log = start(*words, "-o", output, kill=PROGRESS)
    assert status == -signal.SIGKILL, log
    assert start(*repack, tmp_path / "one")[0] == 0
    before = contents(partial(output))
    with starter(tmp_path, OMP_NUM_THREADS="2") as with_two:
        status, log = with_two(*words, "-o", output, "--resume")
        assert status == 1 and "processor.threads 1, not 2" in log and "OMP_NUM_THREADS=1" in log
        assert contents(partial(output)) == before
        assert with_two(*repack, tmp_path / "two")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    manifest = json.loads(contents(tmp_path / "one")["marlin_convert.json"])
    assert manifest["processor"] is None
    assert start(*words, "-o", output, "--resume")[0] == 0
    assert contents(output) == whole
    processor = json.loads(whole["marlin_convert.json"])["processor"]
    assert processor["threads"] == 1 and processor.keys() == {"threads", "capability", "bf16_units"}


@pytest.mark.parametrize("field, value", [("capability", "DEFAULT"), ("bf16_units", "unheard of")])
def test_another_processor_is_named(
    field: str, value: str, stopped: Path, tinypy: Path, text: Path, tmp_path: Path
) -> None:
    note = partial(stopped) / "progress.json"
    noted = json.loads(note.read_text())
    noted["settings"]["processor"][field] = value
    note.write_text(json.dumps(noted))
    with pytest.raises(ConvertError, match=f"processor.{field} '{value}'") as refused:
        story.quantize(job(tinypy, stopped, text, resume=True))
    assert "a machine like" in (refused.value.hint or "")


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
    earlier = earlier_output(output)

    def fill_up() -> None:
        patience = time.monotonic() + 30
        while blocks_done(output) < 2 and time.monotonic() < patience:  # the writing thread may be behind
            time.sleep(0.01)
        fill(small_disk)

    with pytest.raises(ConvertError, match="no space left") as refused:
        story.quantize(job(tinypy, output, text, overwrite=True), stop_after(2, fill_up))
    assert "--resume" in (refused.value.hint or "")
    assert contents(tinypy) == source
    assert contents(output) == earlier
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


def test_another_process_at_work_is_left_alone(
    tinypy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its first block is finished, when there is nothing yet that a resume could use."""
    output = tmp_path / "out"
    other = UnfinishedRun(output)
    other.begin({}, {"blocks": 0, "tensors": 0, "matrices": [], "divergence": []})
    (other.staging / "model.safetensors").write_bytes(b"begun")
    with pytest.raises(ConvertError, match="another process is at work"):
        story.quantize(job(tinypy, output, text))
    with monkeypatch.context() as patch, pytest.raises(ConvertError, match="No locks available"):
        patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
        story.quantize(job(tinypy, output, text))
    assert (other.staging / "model.safetensors").read_bytes() == b"begun"
    other.release()
    story.quantize(job(tinypy, output, text))
    assert output.is_dir() and not other.directory.exists()
