"""Python code that a model brings along: which files it is, and what its JSON files say of it.

transformers runs it where it is trusted. A checkpoint has both, the code and the words that name it, or
neither: words alone make it one that cannot be loaded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marlin_convert.checkpoint.reader import Checkpoint, belongs, json_file
from marlin_convert.errors import SourceError

# The JSON files that we carry over and that can name code, and the keys under which they do.
NAMING = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
KEYS = ("auto_map", "custom_pipelines")


def named_in(directory: Path) -> dict[str, list[str]]:
    """The keys that name code, by JSON file."""
    found = {}
    for name in NAMING:
        keys = [key for key in KEYS if key in _settings(directory, name)]
        if keys:
            found[name] = keys
    return found


def without_code(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a JSON file but for those that name code."""
    return {key: value for key, value in settings.items() if key not in KEYS}


def code_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The Python files that the model's JSON files name and those import, and such that are not there.

    A name like org/name--module.Class is of another repository, where transformers looks for it.
    """
    directory = checkpoint.directory
    modules = {
        reference.rpartition(".")[0]
        for name in NAMING
        for key in KEYS
        for reference in _references(_settings(directory, name).get(key))
        if "--" not in reference
    }
    found, missing, todo = set(), set(), {f"{module}.py" for module in modules if module}
    while todo:
        name = todo.pop()
        if Path(name).name != name or not belongs(directory / name, directory):
            missing.add(name)
            continue
        found.add(name)
        todo |= {f"{module}.py" for module in _imported(directory / name)} - found - missing
    return sorted(found), sorted(missing)


def _settings(directory: Path, name: str) -> dict[str, Any]:
    try:
        return json_file(directory, name)
    except SourceError:  # not there, or not read by anybody
        return {}


def _references(value: Any) -> Iterator[str]:
    """Every "module.Class" below a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _references(one)


def _imported(path: Path) -> list[str]:
    """The modules beside it that a Python file imports, as transformers finds them."""
    from transformers.dynamic_module_utils import get_relative_imports

    try:
        return get_relative_imports(path)
    except (OSError, UnicodeDecodeError):
        return []
