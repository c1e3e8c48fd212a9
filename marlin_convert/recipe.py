"""A recipe: every choice that decides what a conversion writes. Loaded from YAML, changed by flags."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from marlin_convert import options, plain_text
from marlin_convert.errors import ConvertError

DEFAULT = "w4a16"
# "dense" is what sparsify writes
FORMATS = (*options.FORMATS, "dense")
SCALES = ("signed", "positive")
EFFORTS = ("fast", "default", "high")
METHODS = ("sparsegpt", "wanda", "magnitude")
# The settings that a repack heeds; the others are about how codes are made.
REPACKED = ("format", "bits", "group_size", "overrides", "only", "skip", "unpruned", "dtype")
BITS = (4, 8)
GROUP_SIZES = ("auto", 128, 64, 32, -1)
# Words that a pattern may be.
SHORT = {"experts": "*.experts.*"}
MOST = 10**9  # of anything that is counted
NESTING_LIMIT = 10
# What Python makes of the bytes of a file's name that are no text where the locale is another.
_BYTES = re.compile("[\udc80-\udcff]")
_HINT = f"the recipe.yaml of any output, and the recipe {DEFAULT}, show every setting."


_OVERRIDE = "must give bits (4 or 8), group_size (auto, 128, 64, 32 or -1) or both for each pattern"


def _is_override(said: Any) -> bool:
    """Whether this is what an override may say."""
    allowed = {"bits": BITS, "group_size": GROUP_SIZES}
    return (
        isinstance(said, Mapping)
        and bool(said)
        and all(
            name in allowed and type(value) in (int, str) and value in allowed[name]
            for name, value in said.items()
        )
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of one conversion; recipes/*.yaml say what each of them means."""

    format: str = "marlin"
    bits: int = 4
    group_size: int | str = "auto"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: str = "signed"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    sparsity: str = "none"
    method: str = "sparsegpt"
    unpruned: tuple[str, ...] = ()
    dtype: str = "auto"
    calibration: str = "builtin"
    samples: int = 256
    sequence_length: int = 2048
    seed: int = 0
    effort: str = "default"
    damping: float = 0.1
    sweeps: int = 2

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "format": (self.format in FORMATS, "unknown"),
            "bits": (self.bits in BITS, "must be 4 or 8"),
            "group_size": (self.group_size in GROUP_SIZES, "must be auto, 128, 64, 32 or -1"),
            "overrides": (all(map(_is_override, self.overrides.values())), _OVERRIDE),
            "scales": (self.scales in SCALES, "must be signed or positive"),
            "sparsity": (self.sparsity in ("none", "2:4"), "must be none or 2:4"),
            "method": (self.method in METHODS, f"must be one of {', '.join(METHODS)}"),
            "dtype": (self.dtype in ("auto", "float16", "bfloat16"), "must be auto, float16 or bfloat16"),
            "calibration": (_BYTES.sub("", self.calibration).isprintable(), "must be one line of text"),
            "samples": (1 <= self.samples <= MOST, f"must be at least 1, at most {MOST}"),
            "sequence_length": (1 <= self.sequence_length <= MOST, f"must be at least 1, at most {MOST}"),
            "seed": (-(2**63) <= self.seed < 2**63, "must fit in 64 bits"),
            "effort": (self.effort in EFFORTS, f"must be one of {', '.join(EFFORTS)}"),
            "damping": (0 < self.damping <= 1, "must be above 0, at most 1"),
            "sweeps": (0 <= self.sweeps <= MOST, f"must be at least 0, at most {MOST}"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise ConvertError(f"recipe: {name} = {getattr(self, name)!r} {rule}.", _HINT)

    def of(self, name: str) -> tuple[int, int | str]:
        """Bits and group size of a matrix: of the first override whose pattern it matches, or of all."""
        pattern = first_match(name, self.overrides)
        said = self.overrides[pattern] if pattern is not None else {}
        return said.get("bits", self.bits), said.get("group_size", self.group_size)

    @property
    def all_bits(self) -> set[int]:
        """The bits that any matrix has."""
        return {self.bits, *(said.get("bits", self.bits) for said in self.overrides.values())}

    def changed(self, settings: Mapping[str, Any]) -> "Recipe":
        """This recipe with some settings replaced; None stays. ConvertError for one that is none."""
        return replace(
            self, **{name: _setting(name, value) for name, value in settings.items() if value is not None}
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON and YAML can hold them."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("only", "skip", "unpruned")}

    def dump(self) -> str:
        """The recipe as YAML that `load` reads back."""
        return to_yaml(self.to_dict())


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that options gave: those that are None or empty were not. A path is text in a recipe."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if value is not None and value not in ((), [])
    }


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of a recipe's patterns that a linear's name matches."""
    return next((one for one in patterns if fnmatchcase(name, SHORT.get(one, one))), None)


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Some settings as YAML that `load` reads back."""
    return yaml.safe_dump(dict(settings), sort_keys=False)


def named_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = files("marlin_convert").joinpath("recipes")
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def about(name: str) -> str:
    """What the first comment of a recipe that comes with the package says of it, its first sentence."""
    comment = []
    for line in _text(name).splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".") + "."


def _text(name: str) -> str:
    return files("marlin_convert").joinpath("recipes", f"{name}.yaml").read_text("utf-8")


def load(name_or_file: str) -> Recipe:
    """A recipe by name, or from a YAML file; ConvertError says which key or value is wrong."""
    if name_or_file in named_recipes():
        text = _text(name_or_file)
    elif _is_file(name_or_file):
        text = plain_text.read(Path(name_or_file))
    else:
        raise ConvertError(
            f"there is no recipe {name_or_file!r}.",
            f"use one of {', '.join(named_recipes())}, or the path of a YAML file.",
        )
    try:
        settings = _yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConvertError(f"recipe {name_or_file!r} cannot be read as YAML: {reason}", _HINT) from error
    return from_settings({} if settings is None else settings, name_or_file)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False


def _yaml(text: str) -> Any:
    """What YAML says without tags, aliases (a few lines of which can mean gigabytes) and deep nesting."""
    depth = 0
    for event in yaml.parse(text):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise ValueError(f"line {line} has an alias or a tag")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > NESTING_LIMIT:
            raise ValueError(f"line {line} is nested more than {NESTING_LIMIT} deep")
    settings = yaml.safe_load(text)
    str(settings)  # ValueError for an integer too long to be shown
    return settings


def from_settings(settings: Any, source: str) -> Recipe:
    """The recipe of settings, with defaults for the others; ConvertError, which names `source`, for none."""
    if not isinstance(settings, dict):
        raise ConvertError(f"recipe {source!r} is not a mapping of settings.", _HINT)
    defaults = asdict(Recipe())
    for name, value in settings.items():
        if name not in defaults:
            known = ", ".join(defaults)
            raise ConvertError(f"recipe {source!r} has an unknown setting {name!r}.", f"known are {known}.")
        settings[name] = _setting(name, value, f"recipe {source!r}: ")
    if "calibration" in settings:  # no shell has seen a ~ in it
        settings["calibration"] = os.path.expanduser(settings["calibration"])  # noqa: PTH111, may be no path
    return Recipe(**settings)


def _setting(name: str, value: Any, where: str = "") -> Any:
    """A setting as a recipe holds it; ConvertError for a value of another kind."""
    default = asdict(Recipe())[name]
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConvertError(f"{where}{name} must be a list of patterns, not {value!r}.", _HINT)
        return tuple(value)
    if not _is_like(value, name, default):
        kind = "int" if name == "group_size" else type(default).__name__
        raise ConvertError(f"{where}{name} must be {kind}, not {value!r}.", _HINT)
    return value


def _is_like(value: Any, name: str, default: Any) -> bool:
    """Whether a value is of a setting's kind."""
    if isinstance(value, bool):
        return False
    if name == "group_size":
        return isinstance(value, int | str)
    if isinstance(default, Mapping):
        return isinstance(value, Mapping) and all(isinstance(pattern, str) for pattern in value)
    return isinstance(value, int | float if isinstance(default, float) else type(default))
