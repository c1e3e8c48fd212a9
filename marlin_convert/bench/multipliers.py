"""What is measured: cuBLAS, our two kernels, and those of vLLM and Humming where they can be imported."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from marlin_convert import __version__
from marlin_convert.formats import marlin, marlin_24, words
from marlin_convert.formats.scheme import Scheme
from marlin_convert.kernels.matmul import matmul
from marlin_convert.quantized import QuantizedLinear

# Bytes of weights that are used in turn: more than any L2 holds, so each is cold when its turn comes.
COLD = 400e6
MOST_COPIES = 1024

# Multiplies x (m, k) float16 by one copy of the weights; the product (m, n) may be put into y.
Multiply = Callable[[Tensor, Tensor], Tensor]


class Weights:
    """Random weights of a layer in copies that no L2 holds, packed and, in fewer copies, as float16.

    B, s       (k / 16, 2n) int32 and (groups, n) float16 of every copy, as in MARLIN files
    plain      (n, k) float16: the first copies, dequantized
    """

    def __init__(self, k: int, n: int, group_size: int, device: torch.device):
        """`group_size` is the rows of k that share a scale, -1 for all of them."""
        self.k, self.n, self.group_size = k, n, group_size
        groups = 1 if group_size == -1 else k // group_size
        # any words are codes: only the power they take depends on what is in them
        self.B = [
            torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device=device)
            for _ in range(_copies(k * n / 2))
        ]
        self.s = [torch.rand(groups, n, dtype=torch.half, device=device) * 0.01 + 0.002 for _ in self.B]
        self.plain = [self._layer(copy).dequantize(torch.float16) for copy in range(_copies(2 * k * n))]

    def _layer(self, copy: int) -> QuantizedLinear:
        tensors = {"B": self.B[copy], "s": self.s[copy]}
        return marlin.unpack(tensors, Scheme("marlin", 4, self.group_size))

    @cached_property
    def sparse(self) -> list[dict[str, Tensor]]:
        """Other weights, 2:4: B_24, B_meta and s of every copy, as in Sparse-MARLIN files."""
        shape, device = (self.k // 32, 2 * self.n), self.B[0].device
        quads = product((4, 8, 9, 12, 13, 14), repeat=4)  # all there are: lo + 4 hi, lo < hi
        metadata = torch.tensor([a | b << 4 | c << 8 | d << 12 for a, b, c, d in quads], device=device)
        metadata = metadata.to(torch.int16)
        return [
            {
                "B_24": torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device),
                "B_meta": metadata[torch.randint(len(metadata), shape, device=device)],
                "s": self.s[copy % len(self.s)].clone(),
            }
            for copy in range(_copies(3 * self.k * self.n / 8))
        ]

    @cached_property
    def pruned(self) -> Tensor:
        """(n, k) float16: the first copy that is 2:4, dequantized."""
        layer = marlin_24.unpack(self.sparse[0], Scheme("marlin-24", 4, self.group_size))
        return layer.dequantize(torch.float16)

    @cached_property
    def gptq(self) -> list[tuple[Tensor, Tensor]]:
        """The same copies as peers take them: (k / 8, n) int32 along k, and scales (groups, n) float16."""
        layers = (self._layer(copy) for copy in range(len(self.B)))
        return [(words.pack_rows(layer.codes, 4), layer.scales) for layer in layers]


def _copies(nbytes: float) -> int:
    return min(MOST_COPIES, max(2, math.ceil(COLD / nbytes)))


@dataclass(frozen=True)
class Multiplier:
    """Something that multiplies: `prepare` makes it ready for weights and returns one callable per copy.

    `may_fail` are the exceptions by which it leaves a cell empty; others end the run. `bits` are those of a
    weight, without its share of a scale; it multiplies by the weights that are 2:4 if it is `sparse`.
    """

    name: str
    source: str
    prepare: Callable[[Weights], list[Multiply]]
    may_fail: type[Exception] = torch.cuda.OutOfMemoryError
    bits: int = 4
    sparse: bool = False


def _cublas(weights: Weights) -> list[Multiply]:
    def multiply(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x, weight.t(), out=y)

    return [partial(multiply, weight=weight) for weight in weights.plain]


def _dense(weights: Weights) -> list[Multiply]:
    def multiply(x: Tensor, y: Tensor, B: Tensor, s: Tensor) -> Tensor:
        return matmul(x, B, s)

    return [partial(multiply, B=B, s=s) for B, s in zip(weights.B, weights.s, strict=True)]


def _sparse(weights: Weights) -> list[Multiply]:
    def multiply(x: Tensor, y: Tensor, B_24: Tensor, B_meta: Tensor, s: Tensor) -> Tensor:
        return matmul(x, B_24, s, None, B_meta)

    return [partial(multiply, **copy) for copy in weights.sparse]


# What every speed-up is over, and what every product is compared with.
CUBLAS = Multiplier("cublas", f"torch {torch.__version__}", _cublas, bits=16)

DENSE = Multiplier("marlin-convert", __version__, _dense)
SPARSE = Multiplier("marlin-convert 2:4", __version__, _sparse, bits=3, sparse=True)


def ours(group_size: int) -> tuple[tuple[Multiplier, ...], dict[str, str]]:
    """Our kernels for groups of so many rows, and by name why one is missing."""
    # a layer as small as the format allows: only its groups can be refused
    reason = marlin_24.refusal(128, 64, bits=4, group_size=group_size)
    return ((DENSE,), {SPARSE.name: reason}) if reason else ((DENSE, SPARSE), {})


def peers(vllm_library: Path | None = None) -> tuple[list[Multiplier], dict[str, str]]:
    """The others' kernels that can be imported, and by name why the rest cannot.

    `vllm_library` is a file with vLLM's operators, out of its wheel, in place of an installed vLLM.
    """
    found: list[Multiplier] = []
    missing: dict[str, str] = {}
    try:
        if vllm_library is None:
            import_module("vllm._custom_ops")
        else:
            torch.ops.load_library(vllm_library)
    except Exception as error:  # whatever a foreign package does when it is imported
        missing |= dict.fromkeys(_VLLM, _why(error, "vllm"))
    else:
        source = str(vllm_library) if vllm_library else f"vllm {_version('vllm')}"
        for name, (operator, prepare) in _VLLM.items():
            if hasattr(torch.ops._C, operator):
                found.append(Multiplier(name, source, prepare, Exception))
            else:
                missing[name] = f"{source} has no {operator} here"
    try:
        import_module("humming.layer")
        import_module("humming.forward")
    except Exception as error:
        missing["humming"] = _why(error, "humming")
    else:
        found.append(Multiplier("humming", f"humming {_version('humming-kernels')}", _humming, Exception))
    return found, missing


def _why(error: Exception, package: str) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        return f"{package} is not installed"
    return f"{package} cannot be imported: {said(error)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def said(error: Exception) -> str:
    """What an exception says, in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU's memory is too small"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


U4B8 = 1125899907892224  # what vLLM calls unsigned 4 bits less 8


def _vllm_marlin(weights: Weights) -> list[Multiply]:
    operators, k, n = torch.ops._C, weights.k, weights.n
    device = weights.B[0].device
    empty = torch.empty(0, dtype=torch.int32, device=device)
    locks = torch.zeros(4096, dtype=torch.int32, device=device)
    none = [None] * 5

    def multiply(x: Tensor, y: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return operators.marlin_gemm(
            x, None, packed, None, scales, *none, locks, U4B8, len(x), n, k, True, False, True, False
        )

    return [
        partial(
            multiply,
            packed=operators.gptq_marlin_repack(codes, empty, k, n, 4, False),
            scales=marlin.permute_scales(scales),
        )
        for codes, scales in weights.gptq
    ]


def _vllm_machete(weights: Weights) -> list[Multiply]:
    operators = torch.ops._C

    def multiply(x: Tensor, y: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return operators.machete_mm(
            x, packed, U4B8, torch.half, scales, None, weights.group_size, None, None, None
        )

    return [
        partial(
            multiply,
            packed=operators.machete_prepack_B(codes.t().contiguous().t(), torch.half, U4B8, torch.half),
            scales=scales,
        )
        for codes, scales in weights.gptq
    ]


_VLLM = {
    "vllm-marlin": ("marlin_gemm", _vllm_marlin),
    "vllm-machete": ("machete_mm", _vllm_machete),
}


def _humming(weights: Weights) -> list[Multiply]:
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    def multiply(x: Tensor, y: Tensor, layer: HummingLayer) -> Tensor:
        humming_forward(
            layer.humming_config, inputs=x, weight=layer.weight, weight_scale=layer.weight_scale,
            outputs=y, locks=layer.locks,
        )  # fmt: skip
        return y

    ready: list[Multiply] = []
    for codes, scales in weights.gptq:
        layer = HummingLayer(
            shape_n=weights.n,
            shape_k=weights.k,
            weight_config={"dtype": "int4", "group_size": max(weights.group_size, 0)},
            torch_dtype=torch.float16,
        ).to(codes.device)
        layer.load_from_tensors({"weight": codes.t().contiguous(), "weight_scale": scales.t().contiguous()})
        layer.transform()
        ready.append(partial(multiply, layer=layer))
    return ready
