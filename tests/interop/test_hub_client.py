"""The tests that talk to a Hub, with the oldest client that is promised to work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]
CLIENT = "huggingface_hub==1.33.0"


def test_push_with_an_older_client(tmp_path: Path) -> None:
    """Laid over the installed one; transformers takes both."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, CLIENT], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    version = [sys.executable, "-c", "import huggingface_hub; print(huggingface_hub.__version__)"]
    assert subprocess.check_output(version, env=environment, text=True).strip() == CLIENT.partition("==")[2]
    tests = [ROOT / "tests" / f"test_{name}.py" for name in ("fake_hub", "hub", "push")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], env=environment, cwd=ROOT)
    assert done.returncode == 0
