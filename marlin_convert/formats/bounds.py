"""What every layout asks of codes, zero points and scales before it writes them: lossless, or refused."""

import torch
from torch import Tensor

from marlin_convert.errors import FormatError
from marlin_convert.quantized import QuantizedLinear

# Of the MARLIN layouts, whose kernels multiply codes by it in float16: eight times as much, for the code of
# largest magnitude, is the largest number there.
LARGEST_SCALE = 8188


def check_codes(layer: QuantizedLinear) -> None:
    """Raise FormatError when a code or a zero code of the layer does not fit its bits."""
    if layer.bits == 8 or layer.codes.numel() == 0:
        return
    limit = (1 << layer.bits) - 1
    if int(layer.codes.amax()) > limit:
        _refuse(layer.codes > limit, "codes", f"do not fit {layer.bits} bits", layer.codes)
    if layer.zeros is not None:
        _refuse(layer.zeros > limit, "zero points", f"do not fit {layer.bits} bits", layer.zeros)


def float16_scales(scales: Tensor) -> Tensor:
    """The scales (groups, n) in float16, of exactly the same values.

    FormatError when one is zero, NaN, infinite, or no float16 number: bfloat16 and float32 reach further.
    """
    _refuse(scales == 0, "scales", "are zero", scales)
    _refuse(~torch.isfinite(scales), "scales", "are not finite", scales)
    narrow = scales.to(torch.float16)
    inexact = narrow.to(torch.float32) != scales.to(torch.float32)
    _refuse(inexact, "scales", "cannot be represented exactly in float16", scales, hint=_SOLVE)
    return narrow.contiguous()


def multiplied_scales(scales: Tensor) -> Tensor:
    """The same where kernels multiply in float16: FormatError also for one beyond LARGEST_SCALE."""
    narrow = float16_scales(scales)
    _refuse(narrow.abs() > LARGEST_SCALE, "scales", f"are beyond {LARGEST_SCALE}: weights overflow", scales)
    return narrow


def check_quads(layer: QuantizedLinear) -> None:
    """Raise FormatError when a quad, rows 4t .. 4t + 3 of a column, has more than two weights: not 2:4."""
    if layer.k % 4:
        raise FormatError(f"{layer.k} inputs do not divide into quads")
    weights = layer.quad_weights()
    if int(weights.amax()) <= 2:
        return
    crowded = weights > 2
    quad, column = crowded.nonzero()[0].tolist()
    first, last = 4 * quad, 4 * quad + 3
    codes = layer.codes[first : last + 1, column].tolist()
    raise FormatError(
        f"{int(crowded.sum())} of {crowded.numel()} quads have more than two non-zeros; the first, rows "
        f"{first} to {last} of column {column}, has codes {', '.join(map(str, codes))}"
    )


def check_zeros_above(zeros: Tensor, least: int, reason: str) -> None:
    """Raise FormatError when a zero code (groups, n) lies below least, for the reason given."""
    _refuse(zeros < least, "zero points", reason, zeros)


def check_zeros_below(zeros: Tensor, limit: int, reason: str) -> None:
    """Raise FormatError when a zero code (groups, n) reaches the limit, for the reason given."""
    _refuse(zeros >= limit, "zero points", reason, zeros)


# Scales in float16 are what solving gives.
_SOLVE = "--requantize solves again from the dequantized weights."


def _refuse(wrong: Tensor, what: str, why: str, values: Tensor, hint: str | None = None) -> None:
    count = int(wrong.sum())
    if count:
        row, column = wrong.nonzero()[0].tolist()
        first = f"the first at [{row}, {column}] is {values[row, column].item():g}"
        raise FormatError(f"{count} of {wrong.numel()} {what} {why}; {first}", hint)
