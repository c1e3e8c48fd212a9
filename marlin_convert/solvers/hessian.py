"""The Hessian of a linear layer's squared output error: the mean of x^T x over its calibration inputs."""

import torch
from torch import Tensor


class Hessian:
    """Sums x^T x, (k, k) float32, over all inputs x of a layer (GPTQ, arXiv 2210.17323, section 3).

    Products of 16-bit inputs are exact in the float32 sums, on tensor cores as on a CPU's bfloat16 units.
    """

    def __init__(self, k: int, device: torch.device):
        self.sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0
        self._width = 2048 if device.type == "cuda" else 512

    def add(self, x: Tensor) -> None:
        """Add the inputs x (..., k)."""
        x = x.reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        if x.is_cuda:
            self._add_upper(x, {} if x.dtype == torch.float32 else {"out_dtype": torch.float32})
            return
        # a CPU has no product of 16-bit tensors with a float32 result, but oneDNN can multiply float32
        # tensors in bfloat16, which loses nothing where they came from bfloat16
        precision = "bf16" if x.dtype == torch.bfloat16 else "ieee"
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = precision
        try:
            self._add_upper(x.float(), {})
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before

    def _add_upper(self, x: Tensor, out: dict[str, torch.dtype]) -> None:
        """Add to the block columns down to the diagonal: the rest of the matrix is their mirror."""
        for start in range(0, self.sum.shape[0], self._width):
            columns = slice(start, start + self._width)
            self.sum[: columns.stop, columns] += torch.mm(x[:, : columns.stop].T, x[:, columns], **out)

    def mean(self) -> Tensor:
        """The mean over all tokens, (k, k) float32; the sum is given up."""
        upper = self.sum.triu_().div_(max(self.tokens, 1))
        return upper.add_(upper.triu(1).T)
