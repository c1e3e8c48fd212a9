"""The manifest against directories that keep to it and directories that do not."""

import hashlib
import json
import os

import pytest

from marlin_convert.checkpoint.manifest import MANIFEST, check_files, load, sha256_file
from marlin_convert.errors import SourceError


@pytest.fixture
def output(tmp_path):
    """A directory with its manifest, one of its files in a folder."""
    directory = tmp_path / "out"
    (directory / "sub").mkdir(parents=True)
    files = {}
    for name in ("config.json", "model.safetensors", "sub/a.jinja"):
        (directory / name).write_text(name)
        files[name] = {"sha256": hashlib.sha256(name.encode()).hexdigest(), "size": len(name)}
    (directory / MANIFEST).write_text(json.dumps({"files": files}))
    return directory


def problems(directory, ignore=()):
    manifest = load(directory)
    assert manifest is not None
    return check_files(directory, manifest, ignore)


def test_no_manifest(tmp_path):
    assert load(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": 1}}',
        '{"files": {"a": {"size": 1}}}',
        '{"files": {"a": {"size": "1", "sha256": ""}}}',
        '{"files": {"a": {"size": true, "sha256": ""}}}',
        '{"files": {}, "matrices": {}}',
        '{"files": {}, "divergence": 0.1}',
        '{"files": {}, "divergence": [0.1, "0.2"]}',
        "[" * 100_000,
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(SourceError, match=MANIFEST):
        load(tmp_path)


def test_a_manifest_that_is_a_link_leading_out_is_refused(output):
    (output / MANIFEST).rename(output.parent / "elsewhere")
    (output / MANIFEST).symlink_to("../elsewhere")
    with pytest.raises(SourceError, match="link leading out"):
        load(output)


def test_all_well(output):
    assert problems(output) == []


def test_what_copies_of_a_repository_add_is_no_problem(output):
    for folder in ".git", ".cache":
        (output / folder).mkdir()
        (output / folder / "x").write_text("x")
    (output / ".gitattributes").write_text("x")
    assert problems(output) == []


def test_missing(output):
    (output / "config.json").unlink()
    assert problems(output) == ["'config.json' is missing"]


def test_extra(output):
    for name in ("b.txt", ".env", "sub/.cache", "verify.json"):
        (output / name).write_text("x")
    (output / "folder").symlink_to("sub")
    assert problems(output, ignore=["verify.json"]) == [
        f"'{name}' is not in the manifest" for name in (".env", "b.txt", "folder", "sub/.cache")
    ]


def test_wrong_size(output):
    (output / "config.json").write_text("more than before")
    assert problems(output) == ["'config.json' has 16 bytes, not 11"]


def test_wrong_content(output):
    (output / "config.json").write_text("config,json")
    (problem,) = problems(output)
    assert problem.startswith("'config.json' has sha256 ") and "not " in problem


@pytest.mark.parametrize("how", ["file", "fifo", "dangling"])
def test_what_is_no_regular_file_of_the_directory(output, how):
    path = output / "config.json"
    path.rename(output.parent / "elsewhere")
    if how == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("../elsewhere" if how == "file" else "../nowhere")
    assert problems(output) == ["'config.json' is a link leading out of the directory, or no regular file"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret"])
def test_names_that_lead_out(output, name):
    (output.parent / "secret").write_text("x")
    manifest = load(output)
    assert manifest is not None
    manifest["files"][name] = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    assert check_files(output, manifest) == [f"{name!r} leads out of the directory"]


def test_a_folder_that_is_a_link_is_not_followed(output):
    (output / "sub").rename(output.parent / "sub")
    (output / "sub").symlink_to("../sub")
    assert problems(output) == ["'sub/a.jinja' is missing", "'sub' is not in the manifest"]


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
