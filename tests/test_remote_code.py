"""Code that a model brings along: a checkpoint has it and the words that name it, or neither."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result

Cli = Callable[..., Result]

AUTO_MAP = {
    "AutoConfig": "configuration_tiny.TinyConfig",
    "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    "AutoModel": "other/model--modeling_other.Other",
}
CODE = {
    "configuration_tiny.py": "from transformers import LlamaConfig\n\n\n"
    "class TinyConfig(LlamaConfig):\n    pass\n",
    "modeling_tiny.py": "from transformers import LlamaForCausalLM\n\n"
    "from .configuration_tiny import TinyConfig\nfrom .layers import SCALE\n\n\n"
    "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n",
    "layers.py": "from .constants import SCALE\n",
    "constants.py": "SCALE = 1\n",
    "train.py": "import os\n\nos.remove('everything')\n",
    "processing_tiny.py": "class Images:\n    pass\n",
    "tokenization_tiny.py": "from transformers import PreTrainedTokenizerFast\n\n\n"
    "class TinyTokenizer(PreTrainedTokenizerFast):\n    pass\n",
}
NAMED = set(CODE) - {"train.py"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.save(tiny_models.build("llama", torch.bfloat16), directory)
    for name, text in CODE.items():
        (directory / name).write_text(text)
    edit(directory / "config.json", auto_map=AUTO_MAP, custom_pipelines={"x": {"impl": "layers.Pipeline"}})
    edit(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]},
    )
    (directory / "preprocessor_config.json").write_text("{}")
    edit(directory / "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing_tiny.Images"})
    return directory


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers puts the code it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantize(cli: Cli, source: Path, output: Path, *words: object) -> Result:
    text = tiny_models.text(output.parent)
    short = ("--calibration", text, "--samples", 2, "--sequence-length", 64, "--device", "cpu")
    result = cli("quantize", source, "-o", output, "--format", "gptq", *short, *words)
    assert result.exit_code == 0, result.output
    return result


def settings(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def test_without_trust_neither_comes(cli: Cli, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = quantize(cli, source, output, "--report", tmp_path / "report.html").stdout
    assert not list(output.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        before, after = settings(source, name), settings(output, name)
        assert not {"auto_map", "custom_pipelines"} & after.keys()
        after.pop("quantization_config", None)
        assert after == {key: value for key, value in before.items() if key in after}
        assert before.keys() - after.keys() <= {"auto_map", "custom_pipelines", "_name_or_path"}
    behind = settings(output, "marlin_convert.json")["left_behind"]
    named = [
        "auto_map of config.json",
        "custom_pipelines of config.json",
        "auto_map of tokenizer_config.json",
        "auto_map of preprocessor_config.json",
    ]
    assert behind == [*named, *sorted(CODE)]
    assert f"not copied from the source: {', '.join(behind)}" in said
    page = (tmp_path / "report.html").read_text()
    assert all(f"<li>{name}" in page for name in behind)
    # it loads and is verified, with trust and without
    same = shutil.copytree(output, tmp_path / "same")
    for words in ((), ("--trust-remote-code",)):
        assert cli("verify", output, *words, "--source", same, "--samples", 1, "-q").exit_code == 0


def test_with_trust_both_come(cli: Cli, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = quantize(cli, source, output, "--trust-remote-code").stdout
    assert {path.name for path in output.glob("*.py")} == NAMED
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert settings(output, name)["auto_map"] == settings(source, name)["auto_map"]
    assert "not copied from the source: train.py" in said
    # its own code is enough
    shutil.move(source, source.with_name("elsewhere"))
    same = shutil.copytree(output, tmp_path / "same")
    try:
        done = cli("verify", output, "--trust-remote-code", "--source", same, "--samples", 1)
        assert done.exit_code == 0, done.output
    finally:
        shutil.move(source.with_name("elsewhere"), source)


def test_code_that_is_not_there_or_leads_out(cli: Cli, source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    (tmp_path / "secret.py").write_text("PASSWORD = 1\n")
    (model / "inside.py").symlink_to("../secret.py")
    (model / "layers.py").write_text(
        "from .constants import SCALE\n\nif False:\n    from .absent import X\n    from .inside import Y\n"
        "    from ./../secret import Z\n    from ./etc/secret import Z\n"
    )
    edit(model / "config.json", auto_map={"AutoModelForSequenceClassification": "layers.X"})
    edit(model / "config.json", custom_pipelines={"x": {"impl": "../secret.Y"}})
    said = quantize(cli, model, tmp_path / "out", "--trust-remote-code").stdout
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {
        "layers.py", "constants.py", "processing_tiny.py", "tokenization_tiny.py",
    }  # fmt: skip
    assert "PASSWORD" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.py"))
    behind = settings(tmp_path / "out", "marlin_convert.json")["left_behind"]
    assert {"absent.py", "inside.py", "train.py"} <= set(behind) and len(behind) == len(set(behind))
    assert "not copied from the source: " in said and "absent.py" in said
