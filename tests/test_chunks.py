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
from marlin_convert.hub import Source
from marlin_convert.recipe import Recipe

ONE_BY_ONE = {"marlin_convert.chunks:AT_ONCE": {"cpu": 1}}
ALL_KEPT = ONE_BY_ONE | {"marlin_convert.chunks:KEEP_AFTER": 0.0}
# q, k and v, o, gate and up of one expert, its down: four calls, and so many of 16 matrices
CALLS, FOUND, OF = 4, 7, 16
# of four blocks
EVERY = 4 * (2 + 2 * 4)

COMMANDS = {
    "beside the original": ("quantize", "--format", "gptq"),
    "alone": ("quantize", "--format", "marlin", "--effort", "fast"),
    "2:4": ("quantize", "--format", "marlin-24", "--unpruned", "*.experts.1.*"),
    "only pruned": ("sparsify", "--method", "sparsegpt"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starter(tmp_path_factory.mktemp("log")) as start:
        yield start


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = diverse_models.build("qwen3_moe", vocab_size=4096)
    return tiny_models.save(model, tmp_path_factory.mktemp("source") / "qwen3-moe")


@pytest.fixture(scope="module")
def words(source: Path) -> Callable[[str], list[object]]:
    def of(command: str) -> list[object]:
        verb, *more = COMMANDS[command]
        return [verb, source, *more, "--samples", 8, "--sequence-length", 64, "--device", "cpu", "-v"]

    return of


@pytest.fixture(scope="module")
def whole(start: Start, words, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files of a run that nothing interrupted, and that has kept nothing."""
    made: dict[str, dict[str, bytes]] = {}

    def of(command: str) -> dict[str, bytes]:
        if command not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            status, log = start(*words(command), "-o", output, constants=ONE_BY_ONE)
            assert status == 0 and len(solved(log)) == 4 * OF, log
            made[command] = contents(output)
        return made[command]

    return of


def solved(log: str) -> list[str]:
    """The matrices that a run with -v has solved."""
    return re.findall(r"(model\.layers\.\S+): relative output error", log)


def kept_of(output: Path) -> list[str]:
    return sorted(path.name for path in partial(output).glob("chunks/*/*"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("block", [0, 2])
def test_killed_after_the_first_expert_of_a_block(
    command: str, block: int, start: Start, words, whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    calls = 10 * block + CALLS
    if command == "2:4":  # the unpruned expert and the others are apart, one after another
        assert block in (0, 2)
    kill = ("marlin_convert.chunks:keep", calls)
    status, log = start(*words(command), "-o", output, kill=kill, constants=ALL_KEPT)
    assert status == -signal.SIGKILL, log
    assert blocks_done(output) == block and len(kept_of(output)) >= CALLS
    before = [name for name in solved(log) if name.startswith(f"model.layers.{block}.")]
    assert len(before) >= FOUND
    status, log = start(*words(command), "-o", output, constants=ALL_KEPT)
    assert status == 1 and "--resume" in log, log
    status, log = start(*words(command), "-o", output, "--resume", constants=ALL_KEPT)
    assert status == 0, log
    assert f"block {block}: {FOUND} of its {OF} matrices were solved before" in log
    again = solved(log)
    assert len(again) == len(set(again)) == (4 - block) * OF - FOUND
    assert not set(again) & set(before[:FOUND])
    assert contents(output) == whole(command)
    assert not partial(output).exists()
