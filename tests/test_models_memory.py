"""Free memory in containers: trees of control groups as both versions of them show them."""

from pathlib import Path

import pytest
import torch

from marlin_convert.models import memory

GIB = 1 << 30


def group(directory: Path, **files: object) -> None:
    """A control group; of each file, `_` in its name stands for the dot after `memory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")


def process(directory: Path, cgroup: str, mount: str) -> Path:
    """A process's directory in /proc; the mounts beside those of the groups are another machine's."""
    directory.mkdir()
    (directory / "cgroup").write_text(cgroup)
    other = "23 1 0:2 / / rw - overlay overlay rw\n24 23 0:3 / /proc rw,nosuid - proc proc rw\n"
    (directory / "mountinfo").write_text(other + mount)
    return directory


def second(path: Path, point: Path, *, root: str = "/", inside: str = "/") -> Path:
    mount = f"31 23 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"
    return process(path, f"0::{inside}\n", mount)


def first(path: Path, point: Path, *, root: str = "/", inside: str = "/") -> Path:
    mount = (
        f"32 23 0:27 {root} {point}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"33 23 0:28 {root} {point}/memory rw - cgroup cgroup rw,memory\n"
        f"34 23 0:29 / {point}/unified rw - cgroup2 cgroup2 rw\n"
    )
    return process(path, f"5:cpu,cpuacct:{inside}\n4:memory:{inside}\n1:name=systemd:/\n0::/\n", mount)


def test_the_second_version(tmp_path: Path) -> None:
    """A container sees its own group as the root. Page cache is given back, tmpfs (in `file` too) is not."""
    stat = f"anon {GIB}\nfile {3 * GIB}\nshmem {GIB}\ninactive_file {GIB}\nactive_file {GIB}"
    group(tmp_path / "fs", memory_max=8 * GIB, memory_high="max", memory_current=4 * GIB, memory_stat=stat)
    assert memory.left_in_groups(second(tmp_path / "self", tmp_path / "fs")) == [6 * GIB]
    # without a limit there is nothing to count
    group(tmp_path / "fs", memory_max="max")
    assert memory.left_in_groups(tmp_path / "self") == []
    # above `high` a process is held up until it needs less
    group(tmp_path / "fs", memory_high=GIB)
    assert memory.left_in_groups(tmp_path / "self") == [0]


def test_groups_in_groups(tmp_path: Path) -> None:
    """As Slurm and Kubernetes nest them: each limit counts, with all that is taken in its group."""
    group(tmp_path / "fs")  # the root has no limit and no usage
    group(tmp_path / "fs" / "job", memory_max=4 * GIB, memory_current=3 * GIB, memory_stat="inactive_file 0")
    group(tmp_path / "fs" / "job" / "step", memory_max="max", memory_current=GIB, memory_stat="")
    group(tmp_path / "fs" / "job" / "step" / "task", memory_max=2 * GIB, memory_current=0, memory_stat="")
    proc = second(tmp_path / "self", tmp_path / "fs", inside="/job/step/task")
    assert memory.left_in_groups(proc) == [2 * GIB, GIB]


def test_the_first_version(tmp_path: Path) -> None:
    """The path is that on the machine, and the mount shows the container alone."""
    unlimited = 9223372036854771712
    group(
        tmp_path / "fs" / "memory",
        memory_limit_in_bytes=2 * GIB,
        memory_usage_in_bytes=GIB,
        memory_stat=f"cache {GIB}\nrss 7\ntotal_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}",
    )
    proc = first(tmp_path / "container", tmp_path / "fs", root="/docker/0123", inside="/docker/0123")
    assert memory.left_in_groups(proc) == [2 * GIB - GIB // 2]
    group(
        tmp_path / "fs" / "memory" / "user" / "me",
        memory_limit_in_bytes=unlimited, memory_usage_in_bytes=5, memory_stat="",
    )  # fmt: skip
    proc = first(tmp_path / "machine", tmp_path / "fs", inside="/user/me")
    assert memory.left_in_groups(proc) == [unlimited - 5, 2 * GIB - GIB // 2]


@pytest.mark.parametrize(
    ("root", "inside"), [("/", "/../other"), ("/", "/gone (deleted)"), ("/pods/one", "/"), ("/../..", "/")]
)
def test_a_group_that_cannot_be_seen(root: str, inside: str, tmp_path: Path) -> None:
    group(tmp_path / "fs", memory_max=GIB, memory_current=0, memory_stat="")
    assert memory.left_in_groups(second(tmp_path / "self", tmp_path / "fs", root=root, inside=inside)) == [
        GIB
    ]


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert memory.left_in_groups(tmp_path) == []


def test_what_is_free_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path / "fs", memory_max=12345, memory_current=45, memory_stat="")
    proc = second(tmp_path / "self", tmp_path / "fs")
    assert memory.free_memory(torch.device("cpu")) > GIB // 8
    monkeypatch.setattr(memory.left_in_groups, "__defaults__", (proc,))
    assert memory.free_memory(torch.device("cpu")) == 12300
    assert memory.memory_for_activations(torch.device("cpu")) == 12300 // 128
