"""The weight that a layout's tensors mean, for what multiplies without a kernel: CPUs, and gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from marlin_convert.formats import FORMATS
from marlin_convert.formats.scheme import Scheme


def dequantize(
    scheme: Scheme, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight (n, k) that a layout's tensors hold, on a device."""
    return FORMATS[scheme.format].unpack(tensors, scheme).dequantize(dtype).to(device)


# Beside each tensor of codes that lives: what the weight was made from, and the weight.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(make: Callable[[], Tensor], dtype: torch.dtype, codes: Tensor, *others: Tensor) -> Tensor:
    """What `make` makes of these tensors, kept in that dtype until `codes` is freed or one of them changes.

    Making it takes longer than a product; and it is no part of any module's state.
    """
    made_from = dtype, *(_state(tensor) for tensor in (codes, *others))
    found = _kept.get(codes)
    if found is None or found[0] != made_from:
        with torch.inference_mode(False):  # a later call may be outside
            found = _kept[codes] = made_from, make()
    return found[1]


def kept_beside(codes: Tensor) -> Tensor | None:
    """The weight that is kept beside a tensor of codes now, if there is one."""
    found = _kept.get(codes)
    return None if found is None else found[1]


# Makes of 1, 3, 5, ... numbers that have little in common: 2^64 over the golden ratio, as an int64.
_ODD = -7046029254386353131


def _state(tensor: Tensor) -> tuple[int, int, int]:
    """What another content shows by: place, version, and the sums of rows and of columns, weighed by place.

    No version counts what is written through .data or into inference tensors. The sums find it, also where
    rows or columns only change places, and take a third of the time of a product with one row.
    """
    version = -1 if tensor.is_inference() else tensor._version
    words = tensor.contiguous().view(torch.int64)
    rows, columns = (_ODD * torch.arange(1, 2 * size, 2, device=words.device) for size in words.shape)
    return tensor.data_ptr(), version, int(words.sum(1) @ rows + words.sum(0) @ columns)
