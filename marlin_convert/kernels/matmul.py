"""The torch operator marlin_convert::matmul, its reference in plain torch, and modules around it."""

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from marlin_convert.errors import KernelError
from marlin_convert.formats.bounds import LARGEST_SCALE
from marlin_convert.formats.scheme import Scheme
from marlin_convert.kernels.configurations import choose
from marlin_convert.kernels.dequantized import dequantize, kept, kept_beside
from marlin_convert.kernels.launch import Call, capability, keep
from marlin_convert.quantized import QuantizedLinear

DTYPES = (torch.float16, torch.bfloat16)


def matmul(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    """x (..., k) times MARLIN weights B (k / 16, 2n) int32 and s (groups, n) float16, plus bias: (..., n).

    With B_meta (k / 32, 2n) int16 the weights are Sparse-MARLIN's, B is B_24 (k / 32, 2n).
    On a GPU x and bias are float16 or bfloat16 and sums float32; elsewhere the weights are dequantized to the
    dtype of x, and kept so while B lives. x and bias have gradients, the weights have none. Under autocast
    x and bias are cast, as those of torch's own linear. No scale may be beyond LARGEST_SCALE: modules refuse
    it, here it is the caller's to know.
    KernelError when shapes, dtypes or devices do not fit, or there is no kernel for the GPU.
    """
    kind = "cuda" if x.is_cuda else "cpu"
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, bias = _cast(x, dtype), None if bias is None else _cast(bias, dtype)
    if (
        type(x) is not Tensor
        or not x.is_cuda
        or torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _is_differentiated(x, bias)
    ):
        return torch.ops.marlin_convert.matmul.default(x, B, s, bias, B_meta)
    return _cuda(x, B, s, bias, B_meta)  # past the dispatcher, which takes two microseconds


def reference(x: Tensor, layer: QuantizedLinear, bias: Tensor | None = None) -> Tensor:
    """The same product in float64, from codes and scales: what kernels are measured against."""
    weight = layer.dequantize(torch.float64).to(x.device)
    y = x.double() @ weight.t()
    return y if bias is None else y + bias.double()


class PackedLinear(nn.Module):
    """A linear whose buffers are the tensors of a layout, under their suffixes, and perhaps a bias (n).

    On a GPU it runs the kernel; elsewhere it multiplies by the dequantized weights. Casting it casts the
    bias: the tensors of the layout keep their dtypes.
    """

    bias: Tensor | None

    def __init__(self, packed: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int, int]):
        """`packed` are tensors by suffix, codes first; `shape` is k, n and the number of groups."""
        super().__init__()
        self._suffixes = tuple(packed)
        self.in_features, self.out_features, self._groups = shape
        for suffix, tensor in {**packed, "bias": bias}.items():
            self.register_buffer(suffix, tensor)
        self.check_scales()

    def check_scales(self, name: str = "a layer") -> None:
        """KernelError, with the name of the layer, when a scale is too large for the kernels or no number."""
        check_scales(self._buffers["s"], name)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What printing a model says of it, as torch's own linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, groups={self._groups}, "
            f"bias={self.bias is not None}"
        )

    @property
    def _weight(self) -> Tensor | None:
        """The dequantized weight that is kept beside the codes now; no part of the state."""
        return kept_beside(self._buffers[self._suffixes[0]])  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            packed = any(tensor is self._buffers[suffix] for suffix in self._suffixes)
            return tensor.to(new.device) if packed and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        cast = []
        for suffix in self._suffixes:
            key, ours = prefix + suffix, self._buffers[suffix].dtype  # type: ignore[union-attr]
            if key in state_dict and state_dict[key].dtype != ours:
                cast.append(
                    f"{key} is {state_dict[key].dtype}, {ours} is meant: codes and scales are not cast"
                )
        if cast:  # copied, codes would be other ones
            error_msgs += cast
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.check_scales()


class MarlinLinear(PackedLinear):
    """A linear of B (k / 16, 2n) int32, s (groups, n) float16 and perhaps a bias (n), as in MARLIN files."""

    B: Tensor
    s: Tensor

    def __init__(self, B: Tensor, s: Tensor, bias: Tensor | None = None):
        """KernelError when B and s are not of one layer, or a scale is beyond LARGEST_SCALE."""
        super().__init__({"B": B, "s": s}, bias, shape_of(B, s))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        return matmul(x, self.B, self.s, self.bias)


class Marlin24Linear(PackedLinear):
    """A linear of B_24 int32 and B_meta int16 (k / 32, 2n), s (groups, n) float16 and perhaps a bias (n).

    They are as in marlin-24 files.
    """

    B_24: Tensor
    B_meta: Tensor
    s: Tensor

    def __init__(self, B_24: Tensor, B_meta: Tensor, s: Tensor, bias: Tensor | None = None):
        """KernelError when the tensors are not of one layer, or a scale is beyond LARGEST_SCALE."""
        super().__init__({"B_24": B_24, "B_meta": B_meta, "s": s}, bias, shape_of(B_24, s, B_meta))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n), in the dtype of x."""
        return matmul(x, self.B_24, self.s, self.bias, self.B_meta)


LINEARS = {"marlin": MarlinLinear, "marlin-24": Marlin24Linear}


def check_scales(s: Tensor, name: str) -> None:
    """KernelError when a scale of s (groups, n) is beyond LARGEST_SCALE or no number; meta has none yet."""
    largest = 0.0 if s.is_meta else s.abs().amax().item()
    if not largest <= LARGEST_SCALE:
        raise KernelError(
            f"{name} has a scale of {largest:g}; the kernels multiply by scales up to {LARGEST_SCALE}, "
            "beyond which weights leave float16.",
            "the checkpoint is damaged, or of a model that needs bfloat16: convert it from its original.",
        )


def shape_of(B: Tensor, s: Tensor, B_meta: Tensor | None = None) -> tuple[int, int, int]:
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
    if k % 64 or n % 64 or not k or not n or s.shape[1] != n or B.shape[1] % 2:
        raise KernelError(
            f"{name} is {tuple(B.shape)} and s {tuple(s.shape)}: k and n must be multiples of 64, n "
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
        tensors = (B, s, bias, B_meta)
        self._tensors = [_nothing if one is None else ref(one) for one in tensors]
        self._addresses = [0 if one is None else one.data_ptr() for one in tensors]
        self.k, self.n, groups = shape_of(B, s, B_meta)
        self.group = 0 if groups == 1 else self.k // groups
        self.device = B.device.index
        self.calls: dict[tuple[torch.Size, torch.dtype, int], Call] = {}

    def is_of(self, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> bool:
        """Whether these are the tensors, and in the same place."""
        one, two, three, four = self._tensors
        codes, scales, of_bias, of_meta = self._addresses
        return (
            one() is B
            and two() is s
            and three() is bias
            and four() is B_meta
            and B.data_ptr() == codes
            and s.data_ptr() == scales
            and (bias is None or bias.data_ptr() == of_bias)
            and (B_meta is None or B_meta.data_ptr() == of_meta)
        )


def _nothing() -> None:
    return None


# By the identity of B. As many as the layers of a large model, some times over.
_layers: dict[int, _Layer] = {}
KEPT = 4096

# Numbers of tokens, dtypes and streams of a layer.
KEPT_CALLS = 64


def _cuda(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    device = x.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _launched(x, B, s, bias, B_meta)
    return _launched(x, B, s, bias, B_meta)


def _launched(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> Tensor:
    """The product on the current device, which is that of x."""
    layer = _layers.get(id(B))
    if layer is not None and layer.is_of(B, s, bias, B_meta):
        shape, device = x.shape, layer.device
        call = layer.calls.get((shape, x.dtype, torch._C._cuda_getCurrentRawStream(device)))
        # a graph that is captured gets workspaces of its own
        if call is not None and x.is_contiguous() and not torch._C._cuda_isCurrentStreamCapturing():
            address = x.data_ptr()
            if not address % 16 and x.get_device() == device:
                y = _empty_strided_cuda(call.shape, call.strides, x.dtype)
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
    m = x.numel() // layer.k
    bfloat16, sparse = x.dtype == torch.bfloat16, B_meta is not None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    configuration = choose(m, layer.n, layer.k, layer.group, bfloat16, capability(device), sparse, processors)
    call = Call(configuration, x, B, s, bias, B_meta)
    call(x.data_ptr(), y.data_ptr())
    if not torch.cuda.is_current_stream_capturing():
        stream = torch._C._cuda_getCurrentRawStream(device)
        with _keeping:
            keep(_layers, id(B), layer, KEPT)
            keep(layer.calls, (x.shape, x.dtype, stream), call, KEPT_CALLS)
    return y


_keeping = Lock()


def _check(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> None:
    k, n, _ = shape_of(B, s, B_meta)
    if x.dtype not in DTYPES or not x.dim() or x.shape[-1] != k:
        raise KernelError(
            f"x is {tuple(x.shape)} {x.dtype}; float16 or bfloat16 with {k} inputs is meant.",
            "load the model with dtype='auto', or in float16.",
        )
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise KernelError(f"bias is {tuple(bias.shape)} {bias.dtype}; ({n},) {x.dtype} is meant.")
    _check_places(x, B, s, bias, B_meta)
    for name, tensor in _named(B, s, bias, B_meta).items():
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise KernelError(f"{name} must be contiguous and aligned to 16 bytes.")


def _check_places(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> None:
    for name, tensor in _named(B, s, bias, B_meta).items():
        if tensor.device != x.device:
            raise KernelError(f"{name} is on {tensor.device}, x on {x.device}.")


def _named(B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a layer, as far as it has them, under their names."""
    tensors = {"B" if B_meta is None else "B_24": B, "s": s, "bias": bias, "B_meta": B_meta}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _check_plain(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> None:
    """What torch's own linear refuses: no product of integers, of other inputs, of what is elsewhere."""
    k = (16 if B_meta is None else 32) * B.shape[0]
    if not x.dtype.is_floating_point or not x.dim() or x.shape[-1] != k:
        raise KernelError(f"x is {tuple(x.shape)} {x.dtype}; floating point with {k} inputs is meant.")
    _check_places(x, B, s, bias, B_meta)


def _plain(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    """The product where there is no kernel."""
    _check_plain(x, B, s, bias, B_meta)
    others = (s,) if B_meta is None else (s, B_meta)
    weight = kept(lambda: _weight(B, s, B_meta, x.dtype), x.dtype, B, *others)
    with torch.autocast(x.device.type, enabled=False):  # what is cast was cast before
        return nn.functional.linear(x, weight, bias)


def _weight(B: Tensor, s: Tensor, B_meta: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (n, k) of a layer, where its tensors are."""
    k, _, groups = shape_of(B, s, B_meta)
    size = -1 if groups == 1 else k // groups
    if B_meta is None:
        return dequantize(Scheme("marlin", 4, size), {"B": B, "s": s}, dtype, B.device)
    tensors = {"B_24": B, "B_meta": B_meta, "s": s}
    return dequantize(Scheme("marlin-24", 4, size), tensors, dtype, B.device)


def _fake(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    _check_plain(x, B, s, bias, B_meta)
    return x.new_empty(*x.shape[:-1], B.shape[1] // 2)


def _fake_weight(B: Tensor, s: Tensor, B_meta: Tensor | None, dtype: torch.dtype) -> Tensor:
    return s.new_empty(B.shape[1] // 2, (16 if B_meta is None else 32) * B.shape[0], dtype=dtype)


def _is_differentiated(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of the product, or its tangent, may be asked for."""
    asked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return asked or forward_ad._current_level >= 0


class _Differentiable(torch.autograd.Function):
    """The product with its derivatives in x and bias: those in x go through the dequantized weights."""

    @staticmethod
    def forward(x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, B_meta: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.marlin_convert.matmul.default(x, B, s, bias, B_meta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, B, s, _, B_meta = inputs
        ctx.save_for_backward(B, s, B_meta)
        ctx.save_for_forward(B, s, B_meta)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = gradient @ torch.ops.marlin_convert.weight.default(*ctx.saved_tensors, gradient.dtype)
        if ctx.needs_input_grad[3]:
            bias = gradient.flatten(0, -2).sum(0)
        return x, None, None, bias, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, B: None, s: None, bias: Tensor | None, B_meta: None) -> Tensor:
        if x is None:
            assert bias is not None  # one of the two has a tangent
            return bias.expand(ctx.shape)
        packed, scales, meta = ctx.saved_tensors
        return matmul(x, packed, scales, bias, meta)


def _differentiable(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None = None, B_meta: Tensor | None = None
) -> Tensor:
    if _is_differentiated(x, bias):
        return _Differentiable.apply(x, B, s, bias, B_meta)
    return _Differentiable.forward(x, B, s, bias, B_meta)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of a tensor: float64 and integers are left as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


_library = torch.library.Library("marlin_convert", "DEF")
_library.define("matmul(Tensor x, Tensor B, Tensor s, Tensor? bias=None, Tensor? B_meta=None) -> Tensor")
_library.define("weight(Tensor B, Tensor s, Tensor? B_meta, ScalarType dtype) -> Tensor")
_library.impl("matmul", _cuda, "CUDA")
_library.impl("matmul", _plain, "CompositeExplicitAutograd")
_library.impl("weight", _weight, "CompositeExplicitAutograd")
torch.library.register_fake("marlin_convert::matmul", _fake, lib=_library)
torch.library.register_fake("marlin_convert::weight", _fake_weight, lib=_library)
_library.impl("matmul", _differentiable, "Autograd")
