"""The torch operator marlin_convert::matmul, its reference in plain torch, and a module around it."""

from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.errors import KernelError
from marlin_convert.formats import marlin
from marlin_convert.formats.scheme import Scheme
from marlin_convert.kernels.configurations import choose
from marlin_convert.kernels.launch import Call
from marlin_convert.quantized import QuantizedLinear

DTYPES = (torch.float16, torch.bfloat16)


def matmul(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) times MARLIN weights B (k / 16, 2n) int32 and s (groups, n) float16, plus bias: (..., n).

    x and bias are float16 or bfloat16; sums are float32. KernelError when shapes, dtypes or devices do not
    fit, or there is no kernel for the GPU.
    """
    return torch.ops.marlin_convert.matmul(x, B, s, bias)


def reference(x: Tensor, layer: QuantizedLinear, bias: Tensor | None = None) -> Tensor:
    """The same product in float64, from codes and scales: what kernels are measured against."""
    weight = layer.dequantize(torch.float64).to(x.device)
    y = x.double() @ weight.t()
    return y if bias is None else y + bias.double()


class MarlinLinear(nn.Module):
    """A linear of B (k / 16, 2n) int32, s (groups, n) float16 and perhaps a bias (n), as in MARLIN files.

    On a GPU that there is a kernel for it runs that; elsewhere it multiplies by the dequantized weights.
    """

    B: Tensor
    s: Tensor
    bias: Tensor | None

    def __init__(self, B: Tensor, s: Tensor, bias: Tensor | None = None):
        """KernelError when B and s are not of one layer."""
        super().__init__()
        _shape(B, s)
        self.register_buffer("B", B)
        self.register_buffer("s", s)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        if x.is_cuda:
            return matmul(x, self.B, self.s, self.bias)
        weight = _quantized(self.B, self.s).dequantize(torch.float32).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def _quantized(B: Tensor, s: Tensor) -> QuantizedLinear:
    k, _, groups = _shape(B, s)
    scheme = Scheme("marlin", 4, -1 if groups == 1 else k // groups)
    return marlin.unpack({"B": B.cpu(), "s": s.cpu()}, scheme)


def _shape(B: Tensor, s: Tensor) -> tuple[int, int, int]:
    """k, n and the number of groups of a layer; KernelError when B and s do not fit each other."""
    if B.dim() != 2 or s.dim() != 2 or B.dtype != torch.int32 or s.dtype != torch.float16:
        raise KernelError(
            f"B is {tuple(B.shape)} {B.dtype} and s {tuple(s.shape)} {s.dtype}; "
            "int32 (k / 16, 2n) and float16 (groups, n) are meant."
        )
    k, n, groups = 16 * B.shape[0], B.shape[1] // 2, s.shape[0]
    if k % 128 or n % 64 or not k or not n or s.shape[1] != n or B.shape[1] % 2:
        raise KernelError(
            f"B is {tuple(B.shape)} and s {tuple(s.shape)}: k must be a multiple of 128, n of 64, "
            "the same in both."
        )
    if not groups or (groups != 1 and (k % groups or k // groups not in (32, 64, 128))):
        raise KernelError(f"{groups} groups of {k} inputs: groups are of 32, 64 or 128 rows, or one for all.")
    return k, n, groups


# Prepared launches, by everything that decides them but the addresses of activations and output.
_calls: dict[tuple[Any, ...], Call] = {}
KEPT = 4096


def _cuda(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.new_empty((*x.shape[:-1], s.shape[-1]))
    device = x.device.index
    key = (
        x.shape, x.dtype, B.data_ptr(), B.shape, B.dtype, B.is_contiguous(), s.data_ptr(), s.shape, s.dtype,
        s.is_contiguous(), None if bias is None else (bias.data_ptr(), bias.shape, bias.dtype), B.device,
        s.device, device, torch._C._cuda_getCurrentRawStream(device),
    )  # fmt: skip
    call = _calls.get(key)
    if call is not None and x.is_contiguous() and not x.data_ptr() % 16 and _current(device):
        call(x.data_ptr(), y.data_ptr())
        return y
    _check(x, B, s, bias)
    if not y.numel():
        return y
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    k, n, groups = _shape(B, s)
    group = 0 if groups == 1 else k // groups
    bfloat16 = x.dtype == torch.bfloat16
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        configuration = choose(x.numel() // k, n, k, group, bfloat16, capability)
        call = Call(configuration, x, B, s, bias)
        call(x.data_ptr(), y.data_ptr())
        if not torch.cuda.is_current_stream_capturing():
            if len(_calls) >= KEPT:
                _calls.pop(next(iter(_calls)))
            _calls[key] = call
    return y


def _current(device: int) -> bool:
    """Whether a prepared launch may be used: on the current device, and not in a graph."""
    return torch.cuda.current_device() == device and not torch.cuda.is_current_stream_capturing()


def _check(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None) -> None:
    k, n, _ = _shape(B, s)
    if x.dtype not in DTYPES or not x.dim() or x.shape[-1] != k:
        raise KernelError(f"x is {tuple(x.shape)} {x.dtype}; float16 or bfloat16 with {k} inputs is meant.")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise KernelError(f"bias is {tuple(bias.shape)} {bias.dtype}; ({n},) {x.dtype} is meant.")
    for name, tensor in (("B", B), ("s", s), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise KernelError(f"{name} is on {tensor.device}, x on {x.device}.")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise KernelError(f"{name} must be contiguous and aligned to 16 bytes.")


def _fake(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[1] // 2)


_library = torch.library.Library("marlin_convert", "DEF")
_library.define("matmul(Tensor x, Tensor B, Tensor s, Tensor? bias=None) -> Tensor")
_library.impl("matmul", _cuda, "CUDA")
torch.library.register_fake("marlin_convert::matmul", _fake, lib=_library)
