"""Runs that are killed inside of a block of many experts, and go on with what of it was solved."""

import logging
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diverse_models
import pytest
import tiny_models
import torch
from runs import Start, blocks_done, contents, partial, starter

from marlin_convert import chunks, room
from marlin_convert.commands.quantize import Job, plan_job
from marlin_convert.errors import ConvertError
from marlin_convert.hub import Source
from marlin_convert.recipe import Recipe

# Three micro-batches, and one expert at a time.
ONE_BY_ONE: dict[str, Any] = {
    "marlin_convert.chunks:AT_ONCE": {"cpu": 1, "cuda": 1},
    "marlin_convert.models.hidden:TOKENS": {"cpu": 192, "cuda": 192},
}
ALL_KEPT = ONE_BY_ONE | {"marlin_convert.chunks:KEEP_AFTER": 0.0}
# Calls of the solver in each of two blocks: for q, k and v, for o, and twice for each of four experts.
CALLS, MATRICES = 10, 16
KEEP = "marlin_convert.chunks:keep"

COMMANDS = {
    "beside the original": ("quantize", "--format", "gptq"),
    "alone": ("quantize", "--format", "marlin", "--effort", "fast"),
    "2:4": ("quantize", "--format", "gptq", "--sparsity", "2:4", "--unpruned", "*.experts.1.*"),
    "only pruned": ("sparsify",),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starter(tmp_path_factory.mktemp("log")) as start:
        yield start


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = diverse_models.build("qwen3_moe", vocab_size=4096, num_hidden_layers=2)
    return tiny_models.save(model, tmp_path_factory.mktemp("source") / "qwen3-moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def words(source: Path, text: Path) -> Callable[[str], list[object]]:
    def of(command: str) -> list[object]:
        verb, *more = COMMANDS[command]
        text_words = ("--samples", 8, "--sequence-length", 64, "--calibration", text)
        return [verb, source, *more, *text_words, "--device", "cpu", "-v"]

    return of


@pytest.fixture(scope="module")
def whole(start: Start, words, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files of a run that nothing interrupted, and that has kept nothing."""
    made: dict[str, dict[str, bytes]] = {}

    def of(command: str) -> dict[str, bytes]:
        if command not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            status, log = start(*words(command), "-o", output, constants=ONE_BY_ONE)
            assert status == 0 and len(solved(log)) == 2 * MATRICES, log
            made[command] = contents(output)
        return made[command]

    return of


def solved(log: str) -> list[str]:
    """The matrices that a run with -v has solved."""
    return re.findall(r"(model\.layers\.\S+): relative output error", log)


def kept(output: Path) -> list[str]:
    """The files of chunks of an unfinished run."""
    directory = partial(output) / "chunks"
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.safetensors"))


def finish(start: Start, words: list[object], output: Path, whole: dict[str, bytes], left: int) -> None:
    """Go on to the same bytes, with so many matrices that are `left` to be solved."""
    status, log = start(*words, "-o", output, "--resume", constants=ALL_KEPT)
    assert status == 0 and len(solved(log)) == left, log
    assert contents(output) == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    "command",
    [
        "beside the original",
        "only pruned",
        pytest.param("alone", marks=pytest.mark.faults),
        pytest.param("2:4", marks=pytest.mark.faults),
    ],
)
def test_killed_in_both_blocks_it_solves_nothing_again(
    command: str, start: Start, words, whole, tmp_path: Path
) -> None:
    """After the first expert of one; in the other between the two calls for the last expert."""
    output, command_line = tmp_path / "out", words(command)
    status, log = start(*command_line, "-o", output, kill=(KEEP, 4), constants=ALL_KEPT)
    assert status == -signal.SIGKILL, log
    assert blocks_done(output) == 0 and kept(output) == [f"0/{i}.safetensors" for i in range(4)]
    first = solved(log)
    assert len(first) == 7 and all(".experts.1." not in name for name in first)
    status, log = start(*command_line, "-o", output, constants=ALL_KEPT)
    assert status == 1 and "finished 0 blocks and a part of another" in log and "--resume" in log
    status, log = start(
        *command_line, "-o", output, "--resume", kill=(KEEP, CALLS - 4 + CALLS - 1), constants=ALL_KEPT
    )
    assert status == -signal.SIGKILL, log
    assert f"block 0: 7 of its {MATRICES} matrices were solved before" in log
    second = solved(log)
    assert len(second) == 2 * MATRICES - 7 - 1 and not set(first) & set(second)
    assert blocks_done(output) == 1 and kept(output) == [f"1/{i}.safetensors" for i in range(CALLS - 1)]
    finish(start, command_line, output, whole(command), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_killed_inside_of_a_block_on_a_gpu(start: Start, words, tmp_path: Path) -> None:
    command = [{"cpu": "cuda"}.get(str(word), word) for word in words("beside the original")]
    status, log = start(*command, "-o", tmp_path / "whole", constants=ONE_BY_ONE)
    assert status == 0, log
    output = tmp_path / "killed" / "out"
    output.parent.mkdir()
    status, log = start(*command, "-o", output, kill=(KEEP, 4), constants=ALL_KEPT)
    assert status == -signal.SIGKILL and len(kept(output)) == 4, log
    finish(start, command, output, contents(tmp_path / "whole"), 2 * MATRICES - 7)


KEPT, UNFINISHED = "marlin_convert.checkpoint.kept", "marlin_convert.checkpoint.unfinished"
PLACES = [
    pytest.param(f"{KEPT}:save_file", -13, MATRICES - 4, marks=pytest.mark.faults),  # the third of block 1
    (f"{KEPT}:save_file", 13, MATRICES - 4),  # written, and without its name
    pytest.param(f"{UNFINISHED}:UnfinishedRun.save", -2, MATRICES, marks=pytest.mark.faults),
    (f"{UNFINISHED}:remove", -6, MATRICES),  # block 0 is finished, and its files are there
]


@pytest.mark.parametrize(("place", "call", "left"), PLACES)
def test_killed_while_it_keeps_or_removes(
    place: str, call: int, left: int, start: Start, words, whole, tmp_path: Path
) -> None:
    output, command = tmp_path / "out", "beside the original"
    status, log = start(*words(command), "-o", output, kill=(place, call), constants=ALL_KEPT)
    assert status == -signal.SIGKILL, log
    finish(start, words(command), output, whole(command), left)


@pytest.mark.parametrize(
    "constants",
    [ONE_BY_ONE, {name: value for name, value in ALL_KEPT.items() if not name.endswith("AT_ONCE")}],
    ids=["little would be lost", "all experts at once"],
)
def test_nothing_is_kept_where(constants, start: Start, words, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill = (f"{UNFINISHED}:UnfinishedRun.save", -2)
    status, log = start(*words("beside the original"), "-o", output, kill=kill, constants=constants)
    assert status == -signal.SIGKILL, log
    assert solved(log) and not (partial(output) / "chunks").exists()


def test_what_is_kept_is_of_one_run(start: Start, words, whole, tmp_path: Path) -> None:
    """Another is refused while it is there; one that is to begin again throws it away, at once."""
    output, command = tmp_path / "out", words("alone")
    other = [*command, "--seed", 5]
    assert start(*command, "-o", output, kill=(KEEP, 3), constants=ALL_KEPT)[0] == -signal.SIGKILL
    before = contents(partial(output))
    status, log = start(*other, "-o", output, "--resume", constants=ALL_KEPT)
    assert status == 1 and "recipe.seed 0, not 5" in log, log
    assert contents(partial(output)) == before
    place = (f"{UNFINISHED}:remove", -3)
    status, log = start(*other, "-o", output, "--overwrite", kill=place, constants=ALL_KEPT)
    assert status == -signal.SIGKILL and not kept(output), log
    finish(start, command, output, whole("alone"), 2 * MATRICES)
    shutil.rmtree(output)
    assert start(*command, "-o", output, kill=(KEEP, 3), constants=ALL_KEPT)[0] == -signal.SIGKILL
    status, log = start(*other, "-o", output, "--overwrite", constants=ALL_KEPT)
    assert status == 0 and len(solved(log)) == 2 * MATRICES, log
    assert start(*other, "-o", tmp_path / "fresh", constants=ONE_BY_ONE)[0] == 0
    assert contents(output) == contents(tmp_path / "fresh") != whole("alone")


def test_a_disk_that_takes_no_more_is_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    """The run goes on; what could not be kept is with what comes later."""
    monkeypatch.setattr(chunks, "KEEP_AFTER", 0.0)
    found = chunks.Chunks(tmp_path / "3")
    one, two = [
        ({f"{name}.weight": torch.full((64, 64), value)}, {"name": name})
        for name, value in (("a.b", 1.5), ("c", 2.5))
    ]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with caplog.at_level(logging.WARNING):
            found.add([one])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "1 matrices are not kept" in caplog.text and "File too large" in caplog.text
    assert not list(found.earlier())
    found.add([two])
    found.add([])
    again = list(chunks.Chunks(tmp_path / "3").earlier())
    assert [row for _, row in again] == [{"name": "a.b"}, {"name": "c"}]
    for (tensors, _), (expected, _) in zip(again, (one, two), strict=True):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_file_that_is_gone_is_not_passed_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "KEEP_AFTER", 0.0)
    found = chunks.Chunks(tmp_path / "3")
    for name in ("a", "b"):
        found.add([({f"{name}.weight": torch.ones(4)}, {"name": name})])
    (tmp_path / "3" / "0.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"0\.safetensors', .* is damaged or gone"):
        list(chunks.Chunks(tmp_path / "3").earlier())


def test_the_plan_knows_what_it_takes_on_the_disk(source: Path, tmp_path: Path, monkeypatch) -> None:
    """A block as it is written; nothing where its experts are solved at once, or not solved."""
    job = Job(
        Source(source, "source", None), tmp_path / "out",
        Recipe(samples=8, sequence_length=64, format="gptq"), torch.device("cpu"),
    )  # fmt: skip
    plan = plan_job(job)[1]
    assert chunks.chunk_bytes(plan, job.device) == 0
    assert "what is solved of a block" not in room.rooms(job, plan)[0].taken
    monkeypatch.setitem(chunks.AT_ONCE, "cpu", 1)
    (disk,) = room.rooms(job, plan)
    # codes of half a byte, one fp16 scale a group of 128 and zero points of half a byte, groups as int32
    weights = 128 * (128 + 64 + 64) + 128 * 128 + 4 * 3 * 128 * 128
    groups = (128 + 64 + 64) + 128 + 4 * 3 * 128
    assert disk.taken["what is solved of a block"] == weights // 2 + groups * 5 // 2 + 16 * 128 * 4
