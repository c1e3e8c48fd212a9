"""What users install: the sdist, the wheel built from it, and the command in a bare environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from marlin_convert import __version__, recipe

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tinypy-4m"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path) -> str:
    """What a command prints; the end of it is the failure's message if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with an sdist of a copy of the sources, and the wheel made from that sdist."""
    sources = tmp_path_factory.mktemp("sources") / "marlin-convert"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "examples", "tests")
    shutil.copytree(ROOT, sources, symlinks=True, ignore=unwanted)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, cwd=sources)
    return dist


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_directory(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, which borrows from this one all that the wheel depends on."""
    directory = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(directory, symlinks=True)
    programs = directory / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def files_below(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def test_the_metadata_is_what_an_index_takes(wheel):
    """PyPI reads it with the same library."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = Metadata.from_email(archive.read(name), validate=True)
        assert "marlin_convert/py.typed" in archive.namelist()
    assert found.description_content_type == "text/markdown" and found.keywords and found.classifiers


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    assert {name.partition("/")[0] for name in names} == {
        "marlin_convert",
        f"marlin_convert-{__version__}.dist-info",
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "marlin_convert").rglob("*.py")}
    assert modules <= names, "a folder is missing from `packages` in pyproject.toml"
    for folder in ("recipes", "csrc"):
        assert {f"marlin_convert/{folder}/{name}" for name in files_below(ROOT / folder)} <= names


def test_the_sdist_holds_what_the_wheel_is_made_of(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= members.keys()
    for folder in ("recipes", "csrc"):
        for name in files_below(ROOT / folder):
            assert members[f"marlin_convert/{folder}/{name}"].isfile(), "links do not survive in an sdist"


def test_the_installed_command_quantizes_from_another_directory(bin_directory, tmp_path):
    where = "import marlin_convert; print(marlin_convert.__file__)"
    location = run(bin_directory / "python", "-c", where, cwd=tmp_path)
    assert Path(location.strip()).is_relative_to(bin_directory.parent)

    sizes = ("--samples", 4, "--sequence-length", 128)
    command = (bin_directory / "marlin-convert", "quantize", MODEL, "-o", "out", "--recipe", "w4a16-quick")
    run(*command, *sizes, cwd=tmp_path)
    used = recipe.load(str(tmp_path / "out" / "recipe.yaml"))
    assert used == recipe.load("w4a16-quick").changed({"samples": 4, "sequence_length": 128})
    assert used.sweeps == 0, "the recipe's own settings are in what was used"


def test_the_version_is_said_once(bin_directory, tmp_path):
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    printed = run(bin_directory / "marlin-convert", "--version", cwd=tmp_path)
    assert printed.strip() == f"marlin-convert, version {__version__}"
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_dependency_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {line.partition("==")[0].lower().replace("_", "-") for line in constraints()}
    for requirement in wanted:
        name = requirement.partition(">=")[0].lower().replace("_", "-")
        assert name in names, f"{name} is not in constraints.txt"


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_lock_pins_versions_that_everyone_can_get():
    for line in constraints():
        name, pinned, version = line.partition("==")
        assert name and pinned and version, line
        assert "+" not in version and "@" not in line and "/" not in line, line
