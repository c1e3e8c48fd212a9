"""Fixtures that several test files share."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Before torch is imported, and for the processes that tests start: on models this small one thread is as fast
# as two, and many times faster where other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import packed_models
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result

from marlin_convert.cli.main import main
from marlin_convert.cli.terminal import AboveBars


@pytest.fixture(scope="session")
def tinypy() -> Path:
    """A trained Llama of 4 million parameters: 4 blocks, 256 wide, bfloat16, tied embeddings."""
    return Path(__file__).parent.parent / "examples" / "tinypy-4m"


@pytest.fixture(scope="session")
def quantized(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tinypy in a format: made once, and not to be changed. Calibrated on less than is of any use.

    In marlin-24 the codes are those in gptq, of which the smaller two in every quad are zero.
    """

    @cache
    def make(format: str) -> Path:
        output = tmp_path_factory.mktemp("quantized") / format
        source: object = tinypy
        if format == "marlin-24":
            source = packed_models.prune(make("gptq"), output.with_name("pruned"))
        quantize(f"{source} -o {output} --format {format} --samples 8 --sequence-length 256")
        return output

    return make


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A marlin-24 checkpoint with everything in it: biases, linears that are not 2:4, and dense ones."""
    directory = tmp_path_factory.mktemp("mixed")
    source = tiny_models.save(tiny_models.build("llama", torch.bfloat16), directory / "source")
    text = tiny_models.text(directory)
    skip = "--skip *.1.mlp.gate_proj --skip *.1.mlp.up_proj"
    calibration = f"--calibration {text} --samples 4 --sequence-length 64"
    quantize(f"{source} -o {directory}/gptq --format gptq {skip} {calibration}")
    packed_models.prune(directory / "gptq", directory / "pruned")
    quantize(f"{directory}/pruned -o {directory}/marlin-24 --format marlin-24 --unpruned *.0.mlp.*")
    return directory / "marlin-24"


def quantize(words: str) -> None:
    result = CliRunner().invoke(main, ["quantize", *words.split(), "-q"])
    assert result.exit_code == 0, result.output


@pytest.fixture
def cli() -> Iterator[Callable[..., Result]]:
    """Runs a command line in this process; what is not a ConvertError comes out as the exception it is."""

    def run(*words: object, typed: str | None = None) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words], input=typed)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield run
    # the command logs to the stderr of its own run, which is gone now
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, AboveBars):
            logging.getLogger().removeHandler(handler)
    logging.setLogRecordFactory(logging.LogRecord)
    logging.captureWarnings(False)
