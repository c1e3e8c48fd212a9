"""CUDA C++ to cubins on the user's machine, by NVRTC through cuda-core, kept in a cache on disk."""

import hashlib
import os
import tempfile
import threading
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from marlin_convert.errors import KernelError
from marlin_convert.kernels.configurations import Beside, Configuration

SOURCES = Path(__file__).parents[1] / "csrc"
CACHE = "MARLIN_CONVERT_CACHE"

# The compute capabilities there is code for, and what it is compiled as: wgmma is for sm_90a alone.
ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_87",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100",
    (10, 3): "sm_103",
    (11, 0): "sm_110",
    (12, 0): "sm_120",
    (12, 1): "sm_121",
}

# Two threads that import cuda.core 1.2 at once for the first time find it half made.
_importing = threading.Lock()


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for; KernelError for a GPU that there is no code for."""
    found = ARCHITECTURES.get(capability)
    if found is None:
        known = ", ".join(ARCHITECTURES.values())
        raise KernelError(
            f"there is no kernel for compute capability {capability[0]}.{capability[1]} (only {known}).",
            "use another GPU, or --device cpu.",
        )
    return found


def source(configuration: Configuration | Beside) -> str:
    """The whole program, macros in front."""
    macros = "".join(f"#define {name} {value}\n" for name, value in configuration.defines.items())
    return macros + "".join((SOURCES / name).read_text("utf-8") for name in configuration.sources)


@cache
def cubin(configuration: Configuration | Beside, arch: str) -> bytes:
    """The compiled kernel, from the cache if it is there and whole.

    An entry is the sha256 of the code and the code; its name that of program, architecture and compiler.
    """
    program = source(configuration)
    key = hashlib.sha256("\0".join((program, arch, compiler())).encode()).hexdigest()
    path = cache_directory() / f"{key}.cubin"
    try:
        entry = path.read_bytes()
    except OSError:
        entry = b""
    if len(entry) > 32 and hashlib.sha256(entry[32:]).digest() == entry[:32]:
        return entry[32:]
    code, _ = compile(program, arch)
    _keep(path, hashlib.sha256(code).digest() + code)
    return code


def compile(program: str, arch: str) -> tuple[bytes, str]:
    """The cubin of a program and what the compiler says of registers; KernelError if there is no compiler."""
    compiler()
    with _importing:
        from cuda.core import Program, ProgramOptions

    said: list[str] = []

    class Log:
        def write(self, text: str | bytes) -> None:
            said.append(text if isinstance(text, str) else text.decode())

    options = ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"])
    done = Program(program, "c++", options).compile("cubin", logs=Log())
    return bytes(done.code), "".join(said)


def compiler() -> str:
    """cuda-core, its bindings and NVRTC by version; KernelError if they are not installed."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return f"cuda-core {version('cuda-core')} nvrtc {major}.{minor}"
    except (ImportError, PackageNotFoundError, RuntimeError) as error:
        raise KernelError(
            f"the CUDA compiler cannot be used ({error}).",
            "pip install 'marlin-convert[cuda]'; without a GPU pass --device cpu.",
        ) from error


def cache_directory() -> Path:
    """Where cubins are kept: $MARLIN_CONVERT_CACHE, else marlin-convert in the user's cache directory."""
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "marlin-convert"


def _keep(path: Path, entry: bytes) -> None:
    """Put an entry into the cache whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(entry)
        Path(file.name).replace(path)
    except OSError:
        pass
