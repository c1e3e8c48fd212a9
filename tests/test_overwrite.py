"""--overwrite, --resume and --report replace what marlin-convert wrote, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from runs import contents, earlier_output

from marlin_convert.commands import quantize as story

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.build("llama", torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("source"))


@pytest.fixture
def quantize(cli: Cli, source: Path, tmp_path: Path) -> Callable[..., Result]:
    text = tiny_models.text(source)
    settings = ("--samples", 2, "--sequence-length", 64, "--device", "cpu", "--calibration", text)

    def run(*words: object) -> Result:
        return cli("quantize", source, "-o", tmp_path / "out", *settings, *words)

    return run


def thesis(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("four years of work")


def notebook(output: Path) -> None:
    earlier_output(output)
    (output / "notebook.ipynb").write_text("what came of it")


def changed(output: Path) -> None:
    """As a model that was fine-tuned in place: a file of the same name and size."""
    earlier_output(output)
    (output / "earlier.txt").write_text("AN EARLIER OUTPUT")


def repository(output: Path) -> None:
    earlier_output(output)
    (output / ".git").mkdir()
    (output / ".git" / "HEAD").write_text("ref: refs/heads/main")


def broken_manifest(output: Path) -> None:
    thesis(output)
    (output / "marlin_convert.json").write_text("{}")


def link(output: Path) -> None:
    thesis(output.with_name("elsewhere"))
    output.symlink_to("elsewhere")


def link_to_ours(output: Path) -> None:
    earlier_output(output.with_name("elsewhere"))
    output.symlink_to("elsewhere")


def dangling(output: Path) -> None:
    output.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "put, named",
    [
        (thesis, "has no marlin_convert.json"),
        (notebook, "'notebook.ipynb' is not in the manifest"),
        (changed, "'earlier.txt' has sha256"),
        (repository, "'.git' is there"),
        (broken_manifest, "lists no files"),
        (link, "is a link"),
        (link_to_ours, "is a link"),
        (dangling, "is a link"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--resume",)])
def test_what_is_not_ours_is_not_replaced(
    words: tuple[str, ...],
    put: Callable[[Path], None],
    named: str,
    quantize: Callable[..., Result],
    tmp_path: Path,
) -> None:
    put(tmp_path / "out")
    before, link = contents(tmp_path), (tmp_path / "out").is_symlink()
    refused = quantize("--overwrite", *words)
    assert refused.exit_code == 1 and named in refused.stderr and "Hint: " in refused.stderr
    assert contents(tmp_path) == before and (tmp_path / "out").is_symlink() == link


def test_what_came_into_an_output_meanwhile_is_not_lost(
    quantize: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts a file into the earlier output while the new one is made."""
    earlier_output(tmp_path / "out")
    assemble = story.assemble

    def and_a_notebook(*args: Any) -> dict[str, Any]:
        (tmp_path / "out" / "notebook.ipynb").write_text("what came of it")
        return assemble(*args)

    with monkeypatch.context() as patch:
        patch.setattr(story, "assemble", and_a_notebook)
        refused = quantize("--overwrite")
    assert refused.exit_code == 1 and "'notebook.ipynb' is not in the manifest" in refused.stderr
    (tmp_path / "out" / "notebook.ipynb").rename(tmp_path / "notebook.ipynb")
    assert quantize("--overwrite", "--resume").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notebook.ipynb"}
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"progress.json": "{}", "thesis.txt": "four years of work"},
        {"progress.json": '{"settings": {}, "done": {}}'},
        {"progress.json": "what I did today"},
        {"lock": "the combination is 1234"},
    ],
)
def test_a_directory_like_an_unfinished_run_is_not_touched(
    files: dict[str, str], quantize: Callable[..., Result], tmp_path: Path
) -> None:
    other = tmp_path / "out.partial"
    other.mkdir()
    for name, text in files.items():
        (other / name).write_text(text)
    for words in ((), ("--resume",), ("--overwrite",)):
        refused = quantize(*words)
        assert refused.exit_code == 1 and "is in the way" in refused.stderr
    assert contents(other) == {name: text.encode() for name, text in files.items()}


def test_a_report_replaces_a_report_only(quantize: Callable[..., Result], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert quantize("--report", report).exit_code == 0
    assert quantize("--report", report, "--overwrite").exit_code == 0
    report.write_text("<!doctype html><title>Thesis</title>")
    refused = quantize("--report", report, "--overwrite")
    assert refused.exit_code == 1 and "is no report of marlin-convert" in refused.stderr
    assert report.read_text() == "<!doctype html><title>Thesis</title>"
    refused = quantize("--report", tmp_path / "out" / "report.html", "--overwrite")
    assert refused.exit_code == 1 and "that its manifest does not know" in refused.stderr


def test_a_report_of_verify_replaces_a_report_only(
    cli: Cli, quantize: Callable[..., Result], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert quantize("-q").exit_code == 0
    for _ in range(2):
        assert cli("verify", tmp_path / "out", "--report", report, "-q").exit_code == 0
    report.write_text('{"results": "of four years"}')
    refused = cli("verify", tmp_path / "out", "--report", report, "-q")
    assert refused.exit_code == 1 and "is no report of marlin-convert" in refused.stderr
    assert report.read_text() == '{"results": "of four years"}'


def test_a_mount_point_is_no_output(cli: Cli, source: Path) -> None:
    """No rename can replace it, which would be found out at the very end."""
    result = cli("quantize", source, "-o", "/proc", "--dry-run")
    assert result.exit_code == 1 and "'/proc' is a mount point" in result.stderr


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_the_current_directory_is_no_output(
    words: list[str], quantize: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced under its feet, a shell stands in a directory that is no more."""
    output = tmp_path / "out"
    if words:
        earlier_output(output)
    else:
        output.mkdir()
    monkeypatch.chdir(output)
    before = contents(output)
    result = quantize(*words)
    assert result.exit_code == 1 and "is the current directory" in result.stderr
    assert contents(output) == before
