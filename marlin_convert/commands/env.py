"""The story of `env`: what a report of a fault should say of a machine. No paths, no names, no tokens."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from marlin_convert import __version__

# Of these the versions are said: what does the work, what kernels are compiled with, what serves.
PACKAGES = (
    "torch", "transformers", "safetensors", "huggingface_hub", "triton", "cuda-core", "cuda-bindings",
    "accelerate", "vllm", "sglang", "compressed-tensors", "auto-gptq", "gptqmodel",
)  # fmt: skip
# Of a processor, what decides which products it has.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def environment() -> dict[str, Any]:
    """Versions, processor, memory, GPUs and what is in the cache of compiled kernels."""
    import torch

    from marlin_convert.kernels.compile import cache_directory

    return {
        "marlin-convert": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "torch_cuda": torch.version.cuda,
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "driver": _driver(),
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "compiled_kernels": len(list(cache_directory().glob("*.cubin"))),
    }


def text(found: dict[str, Any]) -> str:
    """The same, a line for each."""
    processor = found["processor"]
    lines = {
        "marlin-convert": found["marlin-convert"],
        "Python": f"{found['python']}, {found['system']}",
        **found["packages"],
        "CUDA of torch": found["torch_cuda"] or "none: a build for CPUs",
        "processor": f"{processor['cores']} cores {' '.join(processor['flags'])}",
        "memory": f"{found['memory_bytes'] / 1e9:.1f} GB",
        "driver": found["driver"] or "none",
        **{f"GPU {number}": _gpu_line(gpu) for number, gpu in enumerate(found["gpus"])},
        "compiled kernels": str(found["compiled_kernels"]),
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{said}" for name, said in lines.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    flags: set[str] = set()
    known = Path("/proc/cpuinfo")
    if known.exists():
        line = next((line for line in known.read_text().splitlines() if line.startswith("flags")), "")
        flags = set(line.split())
    return {"cores": os.cpu_count(), "flags": [flag for flag in FLAGS if flag in flags]}


def _driver() -> str | None:
    known = Path("/proc/driver/nvidia/version")
    if not known.exists():
        return None
    words = known.read_text().split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.1f} GB, "
        f"{gpu['multiprocessors']} multiprocessors"
    )
