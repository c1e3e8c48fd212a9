"""Recipes: those that come with the package, those of users, and flags over both."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from marlin_convert import recipe as recipes
from marlin_convert.errors import ConvertError
from marlin_convert.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.yaml")])
def test_a_recipe_of_the_package(name: str) -> None:
    by_name, by_path = recipes.load(name), recipes.load(str(FOLDER / f"{name}.yaml"))
    assert by_name == by_path
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")  # every one says what it is for
    assert set(yaml.safe_load(text)) <= {field.name for field in fields(Recipe)}


def test_the_names_are_those_of_the_files() -> None:
    assert recipes.named_recipes() == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert recipes.DEFAULT in recipes.named_recipes()


def test_the_default_recipe_explains_every_setting_and_is_the_default() -> None:
    assert recipes.load(recipes.DEFAULT) == Recipe()
    assert set(yaml.safe_load((FOLDER / f"{recipes.DEFAULT}.yaml").read_text())) == {
        field.name for field in fields(Recipe)
    }


def test_a_dumped_recipe_is_read_back(tmp_path: Path) -> None:
    one = Recipe(
        format="gptq", group_size=-1, skip=("*.down_proj", "model.layers.0.*"), seed=-3, damping=0.25
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(one.dump())
    assert recipes.load(str(path)) == one


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_in_an_encoding_that_says_what_it_is(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("skip: ['*.中文']\n", encoding)
    assert recipes.load(str(path)).skip == ("*.中文",)


def test_a_recipe_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("skip: ['*.中文']\n".encode("gbk"))
    with pytest.raises(ConvertError, match=r"recipe\.yaml' is not UTF-8: byte 10"):
        recipes.load(str(path))


def test_flags_go_over_the_recipe_and_none_does_not() -> None:
    one = recipes.load("w4a16-g64").changed({"format": "gptq", "group_size": None, "skip": ("*.x",)})
    assert (one.format, one.group_size, one.skip) == ("gptq", 64, ("*.x",))


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert recipes.load(str(tmp_path / "empty.yaml")) == Recipe()


def test_a_whole_number_does_for_a_float(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("damping: 1\n")
    assert recipes.load(str(tmp_path / "one.yaml")).damping == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("group_sise: 64", "unknown setting 'group_sise'"),
        ("group_size: 48", "group_size = 48 must be"),
        ("group_size: '64'", "group_size = '64' must be auto, 128"),
        ("group_size: [64]", "group_size must be int, not [64]"),
        ("bits: 5", "bits = 5 must be"),
        ("overrides: {'*.q_proj': {bits: 5}}", "must give bits (4 or 8)"),
        ("overrides: {'*.q_proj': {}}", "must give bits (4 or 8)"),
        ("overrides: {'*.q_proj': 8}", "must give bits (4 or 8)"),
        ("overrides: {'*.q_proj': {bit: 8}}", "must give bits (4 or 8)"),
        ("overrides: ['*.q_proj']", "overrides must be dict"),
        ("format: awq", "format = 'awq' unknown"),
        ("dtype: float32", "dtype = 'float32' must be"),
        ("samples: 0", "samples = 0 must be at least 1"),
        ("samples: true", "samples must be int, not True"),
        ("sequence_length: 1.5", "sequence_length must be int"),
        ("seed:", "seed must be int, not None"),
        ("skip: '*.up_proj'", "skip must be a list of patterns"),
        ("skip: [1]", "skip must be a list of patterns"),
        ("damping: 0", "damping = 0 must be above 0"),
        ("damping: .nan", "damping = nan"),
        ("sweeps: -1", "sweeps = -1"),
        ("1: 2", "unknown setting 1"),
        ("- samples", "not a mapping"),
        ("word", "not a mapping"),
        ("false", "not a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("\x00", "holds a NUL"),
        ("!!python/object:os.system {}", "cannot be read as YAML"),
        ("dtype: !!bool maybe", "line 1 has an alias or a tag"),
        ("seed: !!timestamp x", "line 1 has an alias or a tag"),
        ("a: &a [1]\nskip: *a", "line 2 has an alias or a tag"),
        ("skip: " + "[" * 5000, "line 1 is nested more than 10 deep"),
        ("seed: 2001-13-45", "month must be in 1..12"),
        ("seed: 0x_", "cannot be read as YAML"),
        ("seed: 0x" + "f" * 5000, "cannot be read as YAML"),
        ("seed: 0xffffffffffffffff", "seed = 18446744073709551615 must fit in 64 bits"),
        ("samples: 1" + "0" * 400, "samples = 1"),
        ('calibration: "a\\ud800b"', "calibration = 'a\\ud800b' must be one line of text"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConvertError) as refused:
        recipes.load(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.hint


def test_a_recipe_in_no_encoding_we_know(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ConvertError):
        recipes.load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["", "w4a17", "no/such.yaml", ".", "a\0b", "a" * 300])
def test_no_such_recipe(name: str) -> None:
    with pytest.raises(ConvertError, match="there is no recipe") as refused:
        recipes.load(name)
    assert recipes.DEFAULT in (refused.value.hint or "")
