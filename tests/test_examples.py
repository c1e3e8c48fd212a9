"""The notebook in examples/: every cell runs, and what is stored below it is what comes out."""

import ast
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run(source: str, names: dict[str, Any]) -> str:
    """Run a cell as Jupyter does: what it prints, and what its last expression is."""
    lines = ast.parse(source).body
    last = lines.pop() if isinstance(lines[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(ast.Module(lines, []), "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue() + ("" if value is None else repr(value))


def stored(cell: dict[str, Any]) -> str:
    """The text that the file keeps below a cell."""
    texts = (one["text"] if "text" in one else one["data"]["text/plain"] for one in cell["outputs"])
    return "".join("".join(text) for text in texts)


def without_numbers(text: str) -> str:
    """A text with its figures replaced, which differ from one machine to the next."""
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", text)


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["first_steps.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_comes_out(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES / "tinypy-4m", tmp_path / "tinypy-4m")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        shown = run(source, names)
        # what a model writes may differ with the processor, and a GPU runs a check more
        if "generate(" not in source and not torch.cuda.is_available():
            assert without_numbers(shown) == without_numbers(stored(cell)), source
        assert bool(shown) == bool(stored(cell)), source
