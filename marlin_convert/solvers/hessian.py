"""The Hessian of a linear layer's squared output error: the mean of x^T x over its calibration inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Hessian:
    """Sums x^T x, (k, k) float32, over all inputs x of a layer (GPTQ, arXiv 2210.17323, section 3).

    Products of 16-bit inputs are exact in the float32 sums, on tensor cores as on a CPU's bfloat16 units;
    `bf16_units` says that the CPU has some.
    """

    def __init__(self, k: int, device: torch.device, *, bf16_units: bool = False):
        self._bf16_units = bf16_units
        self.sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0
        self._width = 2048 if device.type == "cuda" else 512

    def add(self, x: Tensor) -> None:
        """Add the inputs x (..., k)."""
        x = x.reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        with bf16_products(x.dtype == torch.bfloat16 and self._bf16_units):
            # a CPU has no product of 16-bit tensors with a float32 result
            x = x if x.is_cuda else x.float()
            # block columns down to the diagonal: the rest of the matrix is their mirror
            for start in range(0, self.sum.shape[0], self._width):
                columns = slice(start, start + self._width)
                rows = slice(0, columns.stop)
                self.sum[rows, columns] += product(x[:, rows].T, x[:, columns])

    def mean(self) -> Tensor:
        """The mean over all tokens, (k, k) float32; the sum is given up."""
        mean = self.sum.triu_().div_(max(self.tokens, 1))
        for start in range(0, len(mean), self._width):
            rows = slice(start, start + self._width)
            mean[rows.stop :, rows].copy_(mean[rows, rows.stop :].T)
            mean[rows, rows] += mean[rows, rows].triu(1).T
        return mean


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; 16-bit tensors must be on a GPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


@contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """Let oneDNN multiply float32 tensors in bfloat16, which loses nothing where they came from it."""
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    if wanted:
        switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before
