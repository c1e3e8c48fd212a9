"""The shape of the package: which way the imports point, what files are called, how long functions are."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

from marlin_convert import recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "marlin_convert"

# A folder but cli and commands may import itself, errors, quantized, matrix and what stands here; no file at
# the top.
BELOW = {
    "formats": set(),
    "solvers": set(),
    "kernels": {"formats"},
    "checkpoint": {"formats"},
    "models": {"formats", "checkpoint"},
    "checks": {"formats", "checkpoint", "models", "kernels", "solvers"},
    "integrations": {"formats", "checkpoint", "models", "kernels"},
    "bench": {"formats", "checkpoint", "kernels"},
}
FUNCTIONS = ("quantize", "sparsify", "verify", "generate", "push", "inspect")
LONGEST_FUNCTION = 80
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "core", "base", "manager", "misc"}


def module_name(path: Path) -> str:
    """The dotted name of a file inside the package: "formats.gptq", or "formats" for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node` that can run: functions included, `if TYPE_CHECKING:` left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child)


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or later."""
    path, found = FILES[name], set()
    package = ".".join(("marlin_convert", *path.relative_to(PACKAGE).parts[:-1]))
    for node in statements(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole.removeprefix("marlin_convert.") in FILES else source)
    inside = {target for target in found if target.partition(".")[0] == "marlin_convert"}
    return {target.removeprefix("marlin_convert").removeprefix(".") for target in inside} - {name, ""}


GRAPH = {name: imports(name) for name in FILES}


def room(name: str) -> str:
    """The file at the top, or the folder, that a module belongs to."""
    return name.partition(".")[0]


def test_the_graph_sees_lazy_imports_and_not_those_for_types():
    assert {"commands.quantize", "cli.arguments"} <= GRAPH["cli.quantize"]
    assert "commands.quantize" not in GRAPH["report"]
    assert "formats.words" in GRAPH["formats.gptq"]


def test_every_folder_has_its_place():
    assert {room(name) for name in FILES if FILES[name].parent != PACKAGE} == BELOW.keys() | {
        "cli",
        "commands",
    }


def test_no_import_cycle():
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in finished:
            for target in GRAPH[name]:
                visit(target, (*trail, name))
            finished.add(name)

    for name in GRAPH:
        visit(name, ())


def test_nothing_imports_a_command_but_its_options_and_the_api():
    """And `push`, which with --also repacks and verifies, and `sparsify`, a quantize without rounding."""
    arrows = {
        (name, target) for name, targets in GRAPH.items() for target in targets if room(target) == "commands"
    }
    of_the_api = {arrow for arrow in arrows if arrow[0] == "api"}
    assert {target for _, target in of_the_api} == {f"commands.{name}" for name in FUNCTIONS}
    assert {arrow for arrow in arrows - of_the_api if arrow[0] != arrow[1].replace("commands", "cli")} == {
        ("commands.push", "commands.quantize"),
        ("commands.push", "commands.verify"),
        ("commands.sparsify", "commands.quantize"),
    }


def test_nothing_imports_cli_but_main():
    arrows = {
        (name, target) for name, targets in GRAPH.items() for target in targets if room(target) == "cli"
    }
    assert {arrow for arrow in arrows if room(arrow[0]) != "cli"} == {("__main__", "cli.main")}


def test_errors_and_quantized_stand_at_the_bottom():
    assert not GRAPH["errors"]
    assert GRAPH["quantized"] <= {"errors"}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in BELOW])
def test_folders_import_only_what_is_below(name):
    allowed = {"errors", "matrix", "quantized", room(name)} | BELOW[room(name)]
    upward = {target for target in GRAPH[name] if room(target) not in allowed}
    assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("name", FILES)
def test_modules_are_called_by_a_name_someone_would_say(name):
    assert not VAGUE_NAMES & set(name.split("."))


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_on_a_screen(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name}.{node.name} has {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_modules_say_what_they_are(name):
    assert ast.get_docstring(TREES[name]), f"{FILES[name].relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").iterdir()), ids=lambda path: path.stem)
def test_recipes_load(path):
    assert path.suffix == ".yaml"
    loaded = recipe.load(path.stem)
    assert loaded == recipe.load(str(path))
    assert path.read_text("utf-8").startswith("# "), "a recipe begins by saying what it is for"


def test_the_default_recipe_says_every_setting():
    """The default documents the settings, so none may be missing there, and its values are the defaults."""
    import yaml

    text = (ROOT / "recipes" / f"{recipe.DEFAULT}.yaml").read_text("utf-8")
    assert yaml.safe_load(text) == recipe.Recipe().to_dict()
