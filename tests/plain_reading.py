"""Packed linears read by the formulas in formats/*.py, whole arrays at once, with no code of the package."""

from typing import Any

import numpy as np
import torch

from marlin_convert.formats import Scheme

Found = dict[str, np.ndarray]


def weight(tensors: dict[str, torch.Tensor], linear: str, scheme: Scheme) -> np.ndarray:
    """The weight (n, k) float32 of a packed linear, as its tensors and the scheme say it."""
    found = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module == linear:
            found[suffix] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    codes, scales, zeros, order = _LAYOUTS[scheme.format](found, scheme)
    if order is None:
        order = np.arange(len(codes)) // (len(codes) if scheme.group_size == -1 else scheme.group_size)
    zeros = np.broadcast_to(zeros, scales.shape).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return ((codes.astype(np.float32) - zeros[order]) * scales[order]).T


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of words along the first axis, the first code of a word in its low bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = np.ascontiguousarray(words).view(np.uint32)[:, None] >> shifts & (2**bits - 1)
    return codes.reshape(-1, words.shape[1])


def _marlin(found: Found, scheme: Scheme) -> tuple[Any, ...]:
    b, scales = (found[name] for name in scheme.names or ("B", "s"))
    t, c, f = np.ix_(range(len(b)), range(b.shape[1]), range(8))
    i, j = c % 128 // 4, c % 4
    rows = 16 * t + 2 * (i % 4) + (f >> 2) + 8 * (f & 1)
    columns = 64 * (c // 128) + 16 * j + i // 4 + 8 * ((f >> 1) & 1)
    codes = np.empty((16 * len(b), b.shape[1] // 2), np.uint32)
    codes[rows, columns] = b.view(np.uint32)[:, :, None] >> (4 * f).astype(np.uint32) & 15
    o = np.arange(codes.shape[1])
    if len(scales) == 1:
        return codes, scales[:, 32 * (o // 32) + 2 * (o % 32 // 8) + 8 * (o % 8 // 2) + o % 2], 8, None
    return codes, scales[:, 64 * (o // 64) + o % 64 // 8 + 8 * (o % 8)], 8, None


def _marlin_24(found: Found, scheme: Scheme) -> tuple[Any, ...]:
    b, meta, stored = (found[name] for name in scheme.names or ("B_24", "B_meta", "s"))
    n, k = b.shape[1] // 2, 32 * len(b)
    t, c, f = np.ix_(range(len(b)), range(b.shape[1]), range(8))
    i, j = c % 128 // 4, c % 4
    rows = 16 * t + 2 * (i % 4) + (f >> 2) + 8 * (f & 1)
    columns = 64 * (c // 128) + 8 * (i // 4) + 4 * ((f >> 1) & 1) + j
    left = np.empty((k // 2, n), np.uint32)
    left[rows, columns] = b.view(np.uint32)[:, :, None] >> (4 * f).astype(np.uint32) & 15

    n_, c = np.ix_(range(n), range(k // 16))
    r = 64 * (n_ // 64) + 32 * (n_ % 4 // 2) + 4 * (n_ % 64 // 8) + 2 * (n_ % 2) + n_ % 8 // 4
    swap = r % 2 != c % 2
    r, c = np.where(swap, r ^ 1, r), np.where(swap, c ^ 1, c)
    words = meta.view(np.uint16)[c // 2, 2 * r + c % 2]
    quads = (words[:, :, None] >> np.arange(0, 16, 4) & 15).reshape(n, k // 4).T

    codes = np.full((k, n), 8, np.uint32)
    q, o = np.ix_(range(k // 4), range(n))
    codes[4 * q + (quads & 3), o] = left[0::2]
    codes[4 * q + (quads >> 2), o] = left[1::2]
    scales = np.empty_like(stored)
    o = np.arange(n)
    scales[:, o if len(stored) == 1 else 8 * (o // 8) + o % 8 // 2 + 4 * (o % 2)] = stored
    return codes, scales, 8, None


def _awq(found: Found, scheme: Scheme) -> tuple[Any, ...]:
    def columns(words: np.ndarray) -> np.ndarray:
        eights = _stream(words.T, 4).reshape(-1, 8, len(words))
        return eights[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1, len(words)).T

    return columns(found["qweight"]), found["scales"], columns(found["qzeros"]), None


def _gptq(found: Found, scheme: Scheme) -> tuple[Any, ...]:
    codes = _stream(found["qweight"], scheme.bits)
    zeros = _stream(found["qzeros"].T, scheme.bits).T[:, : codes.shape[1]]
    middle = 1 << (scheme.bits - 1)
    # a symmetric model has no zeros but the middle, whatever version its config claims
    if scheme.symmetric and len(np.unique(zeros)) == 1 and zeros[0, 0] in (middle - 1, middle):
        return codes, found["scales"], middle, found.get("g_idx")
    return codes, found["scales"], zeros + (scheme.version == 1), found.get("g_idx")


def _compressed_tensors(found: Found, scheme: Scheme) -> tuple[Any, ...]:
    n, k = found["weight_shape"]
    codes, scales = _stream(found["weight_packed"].T, scheme.bits)[:k], found["weight_scale"].T
    order = found.get("weight_g_idx")
    zeros: Any = 1 << (scheme.bits - 1)
    if "weight_zero_point" in found:
        zeros = _stream(found["weight_zero_point"], scheme.bits)[:n].T
    return codes, scales, zeros, None if order is None or (order == -1).all() else order


_LAYOUTS = {
    "marlin": _marlin,
    "marlin-24": _marlin_24,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
