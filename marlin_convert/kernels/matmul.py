"""The torch operator marlin_convert::matmul, its reference in plain torch, and modules around it."""

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

from marlin_convert.errors import KernelError
from marlin_convert.formats import FORMATS
from marlin_convert.formats.scheme import Scheme
from marlin_convert.kernels.configurations import choose
from marlin_convert.kernels.launch import Call
from marlin_convert.quantized import QuantizedLinear

DTYPES = (torch.float16, torch.bfloat16)


def matmul(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    """x (..., k) times MARLIN weights B (k / 16, 2n) int32 and s (groups, n) float16, plus bias: (..., n).

    With B_meta (k / 32, 2n) int16 the weights are Sparse-MARLIN's, B is B_24 (k / 32, 2n).
    x and bias are float16 or bfloat16; sums are float32. KernelError when shapes, dtypes or devices do not
    fit, or there is no kernel for the GPU.
    """
    if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return torch.ops.marlin_convert.matmul.default(x, B, s, bias, B_meta)
    return _cuda(x, B, s, bias, B_meta)  # past the dispatcher, which takes two microseconds


def reference(x: Tensor, layer: QuantizedLinear, bias: Tensor | None = None) -> Tensor:
    """The same product in float64, from codes and scales: what kernels are measured against."""
    weight = layer.dequantize(torch.float64).to(x.device)
    y = x.double() @ weight.t()
    return y if bias is None else y + bias.double()


class PackedLinear(nn.Module):
    """A linear whose buffers are the tensors of a layout, under their suffixes, and perhaps a bias (n).

    It multiplies by the dequantized weights. They are made when they are first needed and kept beside the
    buffers, in the input's dtype: making them takes longer than a product, and they are no part of the state.
    """

    bias: Tensor | None

    def __init__(self, scheme: Scheme, tensors: Mapping[str, Tensor], bias: Tensor | None):
        super().__init__()
        self.scheme = scheme
        for suffix, tensor in {**tensors, "bias": bias}.items():
            self.register_buffer(suffix, tensor)
        self._weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        weight = self._weight
        if weight is None or weight.dtype != x.dtype or weight.device != x.device:
            with torch.inference_mode(False):  # a later call may be outside
                weight = dequantize(self.scheme, dict(self.named_buffers()), x.dtype, x.device)
            self._weight = weight
        return nn.functional.linear(x, weight, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        self._weight = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._weight = None
        super()._load_from_state_dict(*args, **kwargs)


class MarlinLinear(PackedLinear):
    """A linear of B (k / 16, 2n) int32, s (groups, n) float16 and perhaps a bias (n), as in MARLIN files.

    On a GPU it runs the kernel; elsewhere it multiplies by the dequantized weights.
    """

    B: Tensor
    s: Tensor

    def __init__(self, B: Tensor, s: Tensor, bias: Tensor | None = None):
        """KernelError when B and s are not of one layer."""
        k, _, groups = _shape(B, s)
        super().__init__(Scheme("marlin", 4, -1 if groups == 1 else k // groups), {"B": B, "s": s}, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        return matmul(x, self.B, self.s, self.bias) if x.is_cuda else super().forward(x)


class Marlin24Linear(PackedLinear):
    """A linear of B_24 int32 and B_meta int16 (k / 32, 2n), s (groups, n) float16 and perhaps a bias (n).

    They are as in marlin-24 files. On a GPU it runs the kernel; elsewhere as MarlinLinear.
    """

    B_24: Tensor
    B_meta: Tensor
    s: Tensor

    def __init__(self, B_24: Tensor, B_meta: Tensor, s: Tensor, bias: Tensor | None = None):
        """KernelError when the tensors are not of one layer."""
        _, _, groups = _shape(B_24, s, B_meta)
        scheme = Scheme("marlin-24", 4, -1 if groups == 1 else 128)
        super().__init__(scheme, {"B_24": B_24, "B_meta": B_meta, "s": s}, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        return matmul(x, self.B_24, self.s, self.bias, self.B_meta) if x.is_cuda else super().forward(x)


LINEARS = {"marlin": MarlinLinear, "marlin-24": Marlin24Linear}


def dequantize(
    scheme: Scheme, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight (n, k) that a layout's tensors hold, on a device."""
    on_cpu = {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
    return FORMATS[scheme.format].unpack(on_cpu, scheme).dequantize(dtype).to(device)


def _shape(B: Tensor, s: Tensor, B_meta: Tensor | None = None) -> tuple[int, int, int]:
    """k, n and the number of groups of a layer; KernelError when its tensors do not fit each other."""
    name, step = ("B", 16) if B_meta is None else ("B_24", 32)
    if B.dim() != 2 or s.dim() != 2 or B.dtype != torch.int32 or s.dtype != torch.float16:
        raise KernelError(
            f"{name} is {tuple(B.shape)} {B.dtype} and s {tuple(s.shape)} {s.dtype}; "
            f"int32 (k / {step}, 2n) and float16 (groups, n) are meant."
        )
    if B_meta is not None and (B_meta.dtype != torch.int16 or B_meta.shape != B.shape):
        raise KernelError(f"B_meta is {tuple(B_meta.shape)} {B_meta.dtype}; int16 {tuple(B.shape)} is meant.")
    k, n, groups = step * B.shape[0], B.shape[1] // 2, s.shape[0]
    if k % 128 or n % 64 or not k or not n or s.shape[1] != n or B.shape[1] % 2:
        raise KernelError(
            f"{name} is {tuple(B.shape)} and s {tuple(s.shape)}: k must be a multiple of 128, n of 64, "
            "the same in both."
        )
    sizes = (32, 64, 128) if B_meta is None else (128,)
    if not groups or (groups != 1 and (k % groups or k // groups not in sizes)):
        known = ", ".join(map(str, sizes))
        raise KernelError(f"{groups} groups of {k} inputs: groups are of {known} rows, or one for all.")
    return k, n, groups


class _Layer:
    """Prepared launches of one layer, by shape and dtype of the activations and stream."""

    def __init__(self, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None):
        self._tensors = [_nothing if one is None else ref(one) for one in (B, s, bias, B_meta)]
        self._addresses = _addresses(B, s, bias, B_meta)
        self.k, self.n, groups = _shape(B, s, B_meta)
        self.group = 0 if groups == 1 else self.k // groups
        self.device = B.device.index
        self.calls: dict[tuple[torch.Size, torch.dtype, int], Call] = {}

    def is_of(self, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> bool:
        """Whether these are the tensors, and in the same place."""
        one, two, three, four = self._tensors
        return (
            one() is B
            and two() is s
            and three() is bias
            and four() is B_meta
            and self._addresses == _addresses(B, s, bias, B_meta)
        )


def _nothing() -> None:
    return None


def _addresses(B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> tuple[int, int, int, int]:
    return (
        B.data_ptr(),
        s.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if B_meta is None else B_meta.data_ptr(),
    )


# By the identity of B. As many as the layers of a large model, some times over.
_layers: dict[int, _Layer] = {}
KEPT = 4096

# Numbers of tokens, dtypes and streams of a layer.
KEPT_CALLS = 64


def _cuda(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    layer = _layers.get(id(B))
    if layer is not None and layer.is_of(B, s, bias, B_meta):
        shape, device = x.shape, layer.device
        call = layer.calls.get((shape, x.dtype, torch._C._cuda_getCurrentRawStream(device)))
        if call is not None and x.is_contiguous() and _current(device):
            address = x.data_ptr()
            if not address % 16 and x.get_device() == device:
                y = x.new_empty((*shape[:-1], layer.n))
                call(address, y.data_ptr())
                return y
    return _prepare(x, B, s, bias, B_meta)


def _prepare(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> Tensor:
    """The product by a launch that is prepared now, and kept for the next time."""
    _check(x, B, s, bias, B_meta)
    y = x.new_empty((*x.shape[:-1], s.shape[-1]))
    if not y.numel():
        return y
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    device = x.device.index
    layer = _layers.get(id(B))
    if layer is None or not layer.is_of(B, s, bias, B_meta):
        layer = _Layer(B, s, bias, B_meta)
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        m = x.numel() // layer.k
        bfloat16, sparse = x.dtype == torch.bfloat16, B_meta is not None
        configuration = choose(m, layer.n, layer.k, layer.group, bfloat16, capability, sparse)
        call = Call(configuration, x, B, s, bias, B_meta)
        call(x.data_ptr(), y.data_ptr())
        if not torch.cuda.is_current_stream_capturing():
            _keep(_layers, id(B), layer, KEPT)
            stream = torch._C._cuda_getCurrentRawStream(device)
            _keep(layer.calls, (x.shape, x.dtype, stream), call, KEPT_CALLS)
    return y


def _keep(cache: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    if len(cache) >= limit and key not in cache:
        cache.pop(next(iter(cache)))
    cache[key] = value


def _current(device: int) -> bool:
    """Whether a prepared launch may be used: on the current device, and not in a graph."""
    return torch._C._cuda_getDevice() == device and not torch._C._cuda_isCurrentStreamCapturing()


def _check(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> None:
    k, n, _ = _shape(B, s, B_meta)
    if x.dtype not in DTYPES or not x.dim() or x.shape[-1] != k:
        raise KernelError(
            f"x is {tuple(x.shape)} {x.dtype}; float16 or bfloat16 with {k} inputs is meant.",
            "load the model with dtype='auto', or in float16.",
        )
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise KernelError(f"bias is {tuple(bias.shape)} {bias.dtype}; ({n},) {x.dtype} is meant.")
    packed = "B" if B_meta is None else "B_24"
    for name, tensor in ((packed, B), ("s", s), ("bias", bias), ("B_meta", B_meta)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise KernelError(f"{name} is on {tensor.device}, x on {x.device}.")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise KernelError(f"{name} must be contiguous and aligned to 16 bytes.")


def _fake(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[1] // 2)


_library = torch.library.Library("marlin_convert", "DEF")
_library.define("matmul(Tensor x, Tensor B, Tensor s, Tensor? bias=None, Tensor? B_meta=None) -> Tensor")
_library.impl("matmul", _cuda, "CUDA")
torch.library.register_fake("marlin_convert::matmul", _fake, lib=_library)
