"""The Python API: what `marlin_convert` itself gives, beside the command line that does the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from inspect import Parameter, isfunction, signature
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import marlin_convert
from marlin_convert import ConvertError, recipe
from marlin_convert.checkpoint.manifest import sha256_file
from marlin_convert.cli.main import main

# the others print what is here and measure what is fast
COMMANDS = sorted({*main.commands} - {"bench", "env", "recipes"})
FUNCTIONS = sorted({*marlin_convert.__all__} - {"ConvertError", "Result"})

# Small enough to take two seconds.
QUICK: dict[str, Any] = {"recipe": "w4a16-quick", "samples": 4, "sequence_length": 128}

# What a command has and its function has not: how results are printed, and what is typed.
PRINTED = {"json", "quiet", "verbose"}
ONLY_TYPED = {"generate": {"chat"}}
# And the other way about.
ONLY_CALLED = {"progress"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files(directory: Path) -> dict[str, str]:
    """The sha256 of every file but the manifest, which has times in it."""
    return {
        path.name: sha256_file(path)
        for path in directory.iterdir()
        if not path.name.startswith("marlin_convert")
    }


def test_every_command_is_a_function():
    assert COMMANDS == FUNCTIONS
    assert set(marlin_convert.__all__) <= set(dir(marlin_convert))


def test_a_name_is_a_function_whatever_was_imported_before():
    """A submodule becomes an attribute of its package: one of the same name would replace the function."""
    code = f"""
from importlib import import_module
import marlin_convert
first = {{name: getattr(marlin_convert, name) for name in {FUNCTIONS}}}
for name in first:
    import_module(f"marlin_convert.commands.{{name}}")
    import_module(f"marlin_convert.cli.{{name}}")
from marlin_convert import {", ".join(FUNCTIONS)}
assert all(globals()[name] is function is getattr(marlin_convert, name) for name, function in first.items())
print({{(type(one).__name__, one.__module__, one.__name__ == name) for name, one in first.items()}})
"""
    assert python(code) == "{('function', 'marlin_convert.api', True)}"


def test_no_module_has_the_name_of_a_function():
    package = Path(marlin_convert.__file__).parent
    assert not {path.stem for path in package.iterdir()} & set(marlin_convert.__all__)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        marlin_convert.quantise  # noqa: B018


def test_importing_it_and_looking_into_a_checkpoint_import_nothing_heavy(quantized):
    heavy = ("torch", "transformers", "numpy", "huggingface_hub", "click")
    code = f"""
import sys
from marlin_convert import *
loaded = [name for name in {heavy} if name in sys.modules]
print(loaded, inspect({str(quantized("marlin"))!r})["format"], "torch" in sys.modules)
"""
    assert python(code) == "[] marlin False"


@pytest.mark.parametrize("name", COMMANDS)
def test_parameters_have_the_names_and_defaults_of_the_options(name):
    command, parameters = main.commands[name], signature(getattr(marlin_convert, name)).parameters
    words = ["x" for one in command.params if isinstance(one, click.Argument)]
    words += ["-o", "x"] if name in ("quantize", "sparsify") else []
    # a command keeps the names of its --help from the first context: those of the group
    values = command.make_context(name, words, parent=main.make_context("marlin-convert", [name])).params
    options = {}
    for one in command.params:
        spelling = max(one.opts, key=len).removeprefix("--").replace("-", "_")
        if spelling not in PRINTED | ONLY_TYPED.get(name, set()):
            options[spelling] = None if one.required else values[one.name]
    assert parameters.keys() - ONLY_CALLED == options.keys()
    for spelling, default in options.items():
        ours = parameters[spelling].default
        ours = None if ours is Parameter.empty else ours
        if spelling == "checks":
            ours = ",".join(ours)
        assert (ours or None) == (default or None), spelling


def test_the_default_recipe_is_the_default():
    assert signature(marlin_convert.quantize).parameters["recipe"].default == recipe.DEFAULT


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_and_typed(name):
    function = getattr(marlin_convert, name)
    assert isfunction(function) and len(function.__doc__.splitlines()) > 2
    assert function.__annotations__.keys() == {*signature(function).parameters, "return"}


def test_quantize_writes_what_the_command_writes_and_says_what_it_cost(tinypy, tmp_path, cli):
    walked: list[int] = []

    def progress(blocks: range, total: int) -> Any:
        for number in blocks:
            yield number
            walked.append(number)

    settings = {"skip": ["*.0.*"], "samples": 4, "sequence_length": 128}
    made = marlin_convert.quantize(tinypy, tmp_path / "ours", progress=progress, **settings)
    assert isinstance(made, marlin_convert.Result)
    words = ("--skip", "*.0.*", "--samples", 4, "--sequence-length", 128)
    assert cli("quantize", tinypy, "-o", tmp_path / "theirs", *words).exit_code == 0
    assert files(made.output) == files(tmp_path / "theirs")
    assert walked == [0, 1, 2, 3]

    assert made.manifest == json.loads((tmp_path / "ours" / "marlin_convert.json").read_text())
    assert made.output == tmp_path / "ours" and 0 < made.seconds < 600
    for size, directory in ((made.source_bytes, tinypy), (made.output_bytes, made.output)):
        tensors = load_file(directory / "model.safetensors").values()
        assert size == sum(one.numel() * one.element_size() for one in tensors)
    assert made.bits_per_weight == 4.125
    assert len(made.divergence) == 4 and all(0 < one < 1 for one in made.divergence[1:])
    assert len(made.errors) == 21 and all(0 < one < 1 for one in made.errors.values())
    assert "model.layers.1.mlp.up_proj" in made.errors
    assert repr(made).startswith("Result(output=") and len(repr(made)) < 300


@pytest.mark.parametrize("name", ["quantize", "sparsify"])
def test_a_dry_run_plans_what_the_command_plans(name, tinypy, tmp_path, cli):
    planned = getattr(marlin_convert, name)(tinypy, tmp_path / "out", skip=["*.0.*"], dry_run=True)
    words = ("-o", tmp_path / "out", "--skip", "*.0.*", "--dry-run", "--json")
    said = json.loads(cli(name, tinypy, *words).stdout)
    assert planned.plan.pop("seconds") >= 0 and said.pop("seconds") >= 0  # measured on this machine
    assert planned.plan == said
    assert planned.output_bytes == said["output_bytes"] and not planned.manifest
    assert not list(tmp_path.iterdir())


def test_a_second_call_needs_overwrite_as_the_command_does(tinypy, tmp_path):
    first = marlin_convert.quantize(str(tinypy), str(tmp_path / "out"), seed=1, **QUICK)
    before = files(first.output)
    with pytest.raises(ConvertError, match="already exists"):
        marlin_convert.quantize(tinypy, tmp_path / "out", **QUICK)
    assert files(first.output) == before
    second = marlin_convert.quantize(tinypy, tmp_path / "out", overwrite=True, seed=1, **QUICK)
    assert files(second.output) == before


def test_a_quantized_source_is_repacked(quantized, tmp_path):
    made = marlin_convert.quantize(quantized("marlin"), tmp_path / "out", format="gptq")
    assert made.manifest["recipe"]["format"] == "gptq"
    repacked, solved = (load_file(one / "model.safetensors") for one in (made.output, quantized("gptq")))
    assert repacked.keys() == solved.keys()
    assert all(torch.equal(repacked[name], solved[name]) for name in solved)


def test_several_formats_are_a_directory_each(tinypy, tmp_path):
    made = marlin_convert.quantize(tinypy, tmp_path, format=["marlin", "gptq"], **QUICK)
    assert {made.output, *made.also} == {tmp_path / "marlin", tmp_path / "gptq"}
    assert [marlin_convert.inspect(one)["format"] for one in (made.output, *made.also)] == ["gptq", "marlin"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "awq"}, "awq"),
        ({"bits": 3}, "bits = 3"),
        ({"group_size": 16}, "group_size = 16"),
        ({"group_size": 1.5}, "group_size must be"),
        ({"sparsity": "1:2"}, "1:2"),
        ({"effort": 3}, "effort must be str"),
        ({"samples": "4"}, "samples must be int"),
        ({"samples": 0}, "samples = 0"),
        ({"seed": True}, "seed must be int"),
        ({"skip": "*.down_proj"}, "list of patterns"),
        ({"only": [1]}, "list of patterns"),
        ({"calibration": Path("nothing.txt")}, "nothing.txt"),
        ({"recipe": "w2a16"}, "w2a16"),
        ({"format": "marlin,dense"}, "'dense' is not one of marlin, marlin-24"),
        ({"format": 3}, "3 is not a list of names"),
        ({"device": "gpu"}, "--device 'gpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"max_shard_size": "big"}, "--max-shard-size"),
        ({"max_shard_size": 0}, "--max-shard-size"),
        ({"report": "no/where.html"}, "no/where.html"),
        ({"revision": "main"}, "--revision"),
    ],
)
def test_bad_input_is_a_convert_error_and_nothing_is_written(options, said, tinypy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvertError, match=said):
        marlin_convert.quantize(tinypy, "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda: marlin_convert.quantize("no/where/at/all", "out"),
        lambda: marlin_convert.sparsify("README", "out", method="magic"),
        lambda: marlin_convert.verify("no/where/at/all"),
        lambda: marlin_convert.inspect("no/where/at/all"),
        lambda: marlin_convert.generate("no/where/at/all"),
        lambda: marlin_convert.push("no/where/at/all", "me/name"),
    ],
    ids=["quantize", "sparsify", "verify", "inspect", "generate", "push"],
)
def test_what_is_not_there_is_a_convert_error(call: Callable[[], Any], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvertError):
        call()
    assert not list(tmp_path.iterdir())


def test_sparsify_leaves_two_weights_of_four(tinypy, tmp_path):
    made = marlin_convert.sparsify(tinypy, tmp_path / "out", method="magnitude", **QUICK)
    with safe_open(made.output / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.2.mlp.down_proj.weight")
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert len(made.errors) == 28


def test_verify_says_what_it_found(tinypy, tmp_path):
    out = marlin_convert.quantize(tinypy, tmp_path / "out", **QUICK).output
    done = marlin_convert.verify(out, source=tinypy, samples=2, sequence_length=64)
    assert done.passed and done.verified
    assert done.checks["numbers"].details["text"]["tokens"] == 2 * 63
    assert json.loads((out / "marlin_convert_verify.json").read_text()) == done.to_dict()

    only = marlin_convert.verify(out, checks=("files", "layout"))
    assert {name for name, one in only.checks.items() if one.status == "pass"} == {"files", "layout"}
    assert only.checks == marlin_convert.verify(out, checks="files,layout").checks

    weights = out / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    found = marlin_convert.verify(out)
    assert not found.passed and found.checks["files"].status == "fail"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"checks": "files,magic"}, "magic"),
        ({"samples": 0}, "samples"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": "1e-3"}, "tolerance"),
        ({"device": "gpu"}, "--device"),
    ],
)
def test_what_verify_does_not_take(options, said, quantized):
    with pytest.raises(ConvertError, match=said):
        marlin_convert.verify(quantized("marlin"), **options)


def test_inspect_says_what_the_command_says(quantized, cli):
    found = marlin_convert.inspect(quantized("gptq"))
    assert found == json.loads(cli("inspect", quantized("gptq"), "--json").stdout)


def test_push_prepares_what_it_would_publish(tinypy, tmp_path):
    out = marlin_convert.quantize(tinypy, tmp_path / "out", **QUICK).output
    with pytest.raises(ConvertError, match="is not verified"):
        marlin_convert.push(out, "me/tiny", dry_run=True)
    assert marlin_convert.verify(out, source=tinypy, samples=2, sequence_length=64).verified
    done = marlin_convert.push(out, "me/tiny", license="mit", also="gptq", dry_run=True)
    assert [release.branch for release in done.releases] == ["gptq", "main"]
    assert "license: mit" in done.releases[-1].card and not done.pushed
    with pytest.raises(ConvertError, match="'awq' is not one of gptq, compressed-tensors"):
        marlin_convert.push(out, "me/tiny", also=["awq"], dry_run=True)
