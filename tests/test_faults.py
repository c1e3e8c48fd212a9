"""Every call that changes the disk, or reads from it, fails once in turn: nothing is lost.

The calls are those of the C library; failing_disk.c, compiled here, stands before it.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_models
import torch
from fake_hub import Hub, fake_hub
from runs import Fault, Start, earlier_output, partial, starter

# As in failing_disk.c.
READING, WRITING = 1, 2
KILLED, SHORT, NOTHING = -2, -1, 0

FOREVER = 2**31 - 1

# {disk} is where the calls are counted. Everything that is written to a file besides has one there already.
COMMANDS = {
    "quantize": "quantize {root}/dense -o {disk}/out --overwrite --report {disk}/report --device cpu "
    "--calibration {root}/text.txt --samples 2 --sequence-length 64 --max-shard-size 200KB",
    "repack": "quantize {root}/quantized -o {disk}/out --format gptq --device cpu --max-shard-size 200KB",
    "verify": "verify {disk}/checkpoint --report {disk}/report --device cpu",
    "push": "push {disk}/verified alice/tiny --also gptq",
}


class Trouble(NamedTuple):
    """What happens to a call of a kind, and whether to all that follow it."""

    kind: int
    outcome: int
    for_good: bool = False


TROUBLES = {
    "full": Trouble(WRITING, errno.ENOSPC),
    "broken": Trouble(WRITING, errno.EIO),
    "gone": Trouble(WRITING, errno.EIO, for_good=True),
    "killed": Trouble(WRITING, KILLED),
    "unreadable": Trouble(READING, errno.EIO),
}

Tree = dict[str, bytes | None]


# What a page of a conversion says of the run, which is another every time.
OF_THE_RUN = re.compile(rb"made on<dd>[^<]* UTC<dt>took<dd>\d+ s")


def tree(directory: Path) -> Tree:
    """Every file below a directory, but for temporary ones and times; None for a directory."""
    return {
        path.relative_to(directory).as_posix(): OF_THE_RUN.sub(b"", path.read_bytes())
        if path.is_file()
        else None
        for path in sorted(directory.rglob("*"))
        if not path.is_relative_to(directory / "tmp")
    }


def entry(found: Tree, name: str) -> Tree:
    """A file, or a directory with all that is below it."""
    return {path: data for path, data in found.items() if path.split("/")[0] == name}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything happens; not made yet."""
    return tmp_path_factory.mktemp("scene") / "root"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, root: Path, hub: Hub) -> Iterator[Start]:
    """Runs a command line whose disk fails where it is told."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) here to build failing_disk.c with")
    directory = tmp_path_factory.mktemp("shim")
    library, source = directory / "failing_disk.so", Path(__file__).with_name("failing_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    settings = {
        "LD_PRELOAD": str(library),
        "TMPDIR": str(root / "disk" / "tmp"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
    }
    with starter(directory, **settings) as start:
        yield start


class Scene:
    """Sources, and beside them the disk that the commands write on."""

    def __init__(self, root: Path, start: Start, hub: Hub):
        self.root, self.disk, self._start, self._hub = root, root / "disk", start, hub
        self.disk.mkdir(parents=True)
        model = tiny_models.build(
            "llama", torch.bfloat16, tie_word_embeddings=True, attention_bias=False, mlp_bias=False
        )
        tiny_models.save(model, root / "dense")
        (root / "dense" / "additional_chat_templates").mkdir()
        (root / "dense" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
        tiny_models.text(root)
        status, log = self.run("quantize")
        assert status == 0, log
        (self.disk / "out").rename(root / "quantized")
        (self.disk / "report").rename(root / "report")
        status, log = self.run(
            "quantize", "--format", "gptq", kill=("marlin_convert.commands.quantize:publish", -1)
        )
        assert status == -signal.SIGKILL, log
        partial(self.disk / "out").rename(root / "abandoned")
        shutil.copytree(root / "quantized", self.disk / "checkpoint")
        status, log = self.run("verify")
        assert status == 0, log
        (self.disk / "checkpoint").rename(root / "verified")
        self._sources = self._outside()
        self.undisturbed = cache(self._undisturbed)

    def _outside(self) -> Tree:
        return {name: data for name, data in tree(self.root).items() if name.split("/")[0] != "disk"}

    def set_up(self, command: str) -> Tree:
        """What is on the disk before a command: something else wherever it writes."""
        words = COMMANDS[command]
        shutil.rmtree(self.disk)
        (self.disk / "tmp").mkdir(parents=True)
        if "{disk}/report" in words:
            shutil.copyfile(self.root / "report", self.disk / "report")
        if "--overwrite" in words:
            earlier_output(self.disk / "out")
            shutil.copytree(self.root / "abandoned", partial(self.disk / "out"))
        if "{disk}/checkpoint" in words:
            shutil.copytree(self.root / "quantized", self.disk / "checkpoint")
        if "{disk}/verified" in words:
            shutil.copytree(self.root / "verified", self.disk / "verified")
        self._hub.repositories.clear()
        return tree(self.disk)

    def published(self) -> dict[str, dict[str, bytes]]:
        """The branches of the Hub that hold anything, and their files."""
        branches = {
            name: commits[-1].files
            for repository in self._hub.repositories.values()
            for name, commits in repository.branches.items()
        }
        return {name: files for name, files in branches.items() if set(files) != {".gitattributes"}}

    def run(
        self, command: str, *more: str, kill: tuple[str, int] | None = None, fault: Fault | None = None
    ) -> tuple[int, str]:
        """Exit status, and what was printed."""
        words = COMMANDS[command].format(root=self.root, disk=self.disk).split()
        return self._start(*words, *more, kill=kill, fault=fault)

    def fault(self, trouble: Trouble, number: int) -> Fault:
        """The trouble at a call, for `run`."""
        return Fault(
            under=str(self.disk if trouble.kind == WRITING else self.root),
            kind=trouble.kind,
            first=number,
            last=FOREVER if trouble.for_good else number,
            outcome=trouble.outcome,
            trace=str(self.root.with_name("trace")),
        )

    def calls(self) -> list[str]:
        """Name and path of every call of the last run with a fault."""
        return self.root.with_name("trace").read_text().splitlines()

    def _undisturbed(self, command: str, kind: int) -> tuple[Tree, dict[str, dict[str, bytes]], int]:
        """What a command leaves on a good disk and on the Hub, and how many calls of a kind it makes."""
        self.set_up(command)
        status, log = self.run(command, fault=self.fault(Trouble(kind, NOTHING), 0))
        assert status == 0, log
        calls = len(self.calls())
        assert calls, "the library did not come before the C library"
        return tree(self.disk), self.published(), calls

    def fail(self, command: str, trouble: Trouble, number: int) -> None:
        """Let one call fail, then run the command again: nothing is lost, nothing is missing in the end."""
        after, published, _ = self.undisturbed(command, trouble.kind)
        before = self.set_up(command)
        status, log = self.run(command, fault=self.fault(trouble, number))
        found = tree(self.disk)
        what = f"{command}, {trouble}, call {number}: {self.calls()[number - 1]}\nstatus {status}\n{log}"
        if trouble.outcome == KILLED:
            assert status == -signal.SIGKILL, what
        else:
            done = found == after and self.published() == published
            _check_words(status, log, os.strerror(trouble.outcome), done, what)
        assert self._outside() == self._sources, what
        assert self.published().items() <= published.items(), what
        half_written = trouble.for_good or trouble.outcome == KILLED  # as nothing could be removed any more
        for name in {path.split("/")[0] for path in before | after} - {"out.partial"}:
            part = entry(found, name)
            if half_written:
                part = {path: data for path, data in part.items() if not path.endswith(".tmp")}
            whole = part in (entry(before, name), entry(after, name))
            assert whole or status == 3, f"{what}\n{name}: {set(part)}"
        more = found.keys() - after.keys()
        complete = after.items() <= found.items() and self.published() == published
        if complete and more <= {"out.partial", "out.partial/lock"}:
            return  # all is done but for the last of the clean-up
        noted = "out.partial/progress.json"
        resume = noted in found and found[noted] != before.get(noted)
        status, log = self.run(command, *["--resume"] * resume)
        assert status == 0, f"{what}\nthen: {log}"
        assert tree(self.disk) == after, f"{what}\nthen: {tree(self.disk).keys() ^ after.keys()}"
        assert self.published() == published, what


def _check_words(status: int, log: str, reason: str, done: bool, what: str) -> None:
    """A sentence and a hint, or a warning, or everything is well."""
    assert "Traceback" not in log and "None" not in log, what
    assert status in (0, 1, 3) and (done or reason in log), what
    assert status != 1 or ("\nError: " in f"\n{log}" and "\nHint: " in log), what


@pytest.fixture(scope="module")
def scene(root: Path, start: Start, hub: Hub) -> Scene:
    return Scene(root, start, hub)


def test_a_handful_of_calls_fail(scene: Scene) -> None:
    pairs = list(product(COMMANDS, TROUBLES.values()))
    for place, (command, trouble) in enumerate(pairs):
        *_, calls = scene.undisturbed(command, trouble.kind)
        scene.fail(command, trouble, 1 + calls * place // len(pairs))


@pytest.mark.faults
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_call_fails_once(command: str, trouble: str, scene: Scene) -> None:
    *_, calls = scene.undisturbed(command, TROUBLES[trouble].kind)
    print(calls, "calls")
    for number in range(1, calls + 1):
        scene.fail(command, TROUBLES[trouble], number)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_takes_a_part_of_every_write(command: str, scene: Scene) -> None:
    after, *_ = scene.undisturbed(command, WRITING)
    scene.set_up(command)
    status, log = scene.run(command, fault=scene.fault(Trouble(WRITING, SHORT, for_good=True), 1))
    assert status == 0, log
    assert tree(scene.disk) == after


def test_everything_is_on_the_disk_before_it_has_its_name(scene: Scene) -> None:
    """A power failure after the rename loses nothing: all was flushed after its last change, folders too."""
    scene.set_up("quantize")
    status, log = scene.run("quantize", fault=scene.fault(Trouble(WRITING, NOTHING), 0))
    assert status == 0, log
    calls = [call.split(" ", 1) for call in scene.calls()]
    output, staging = scene.disk / "out", partial(scene.disk / "out") / "checkpoint"
    [named] = [number for number, (_, path) in enumerate(calls) if path == str(output)]
    for path in [output, *output.rglob("*")]:
        staged = staging / path.relative_to(output)
        changed, flushed = 0, -1
        for number, (call, where) in enumerate(calls[:named]):
            if call == "fsync":
                flushed = number if where == str(staged) else flushed
            elif str(staged) in (where, str(Path(where).parent)):
                changed = number
        assert flushed > changed, path.name
