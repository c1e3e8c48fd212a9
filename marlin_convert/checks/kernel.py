"""Every packed linear through the kernel, then the whole model, each against its dequantized weights."""

import logging
import math
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from marlin_convert import formats
from marlin_convert.checks.divergence import Comparison, compare
from marlin_convert.checks.outcome import CannotRun, Check, json_number, json_numbers, reporting, verdict
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import FormatError, KernelError
from marlin_convert.models.blocks import BlockModel
from marlin_convert.quantized import QuantizedLinear

log = logging.getLogger("marlin_convert")

BATCHES = (1, 16, 17, 64, 257, 2048)

# Nats a token between the checkpoint on the kernel and the same weights dequantized, both in 16 bits.
KERNEL_DIVERGENCE = 2e-3

# Nats by which the dequantized model may prefer its likeliest token to the one that the kernel finds; what
# bfloat16 rounds makes 0.12 where a model with half of its weights gone reads random tokens.
KERNEL_MARGIN = 0.25


@reporting
def check(problems: list[str], subject: Subject, tolerance: float) -> Check:
    """Multiply random inputs by every linear, then run random tokens through the whole model."""
    from marlin_convert.kernels.compile import architecture

    layouts = {
        linear: subject.weights.scheme_of(linear).format for linear in subject.weights.packed_linears()
    }
    if not torch.cuda.is_available():
        return Check("skipped", "no CUDA GPU here")
    if subject.device.type != "cuda":
        return Check("skipped", f"--device {subject.device}")
    if not layouts:
        return Check("skipped", "no linear is packed")
    try:
        architecture(torch.cuda.get_device_capability(subject.device))
    except KernelError as error:
        return Check("skipped", str(error).removesuffix("."))
    rows, refused, worst = [], [], 0.0
    for linear, format in layouts.items():
        try:
            found = _kernel_error(subject.weights.quantized(linear), format, subject.device)
        except FormatError as error:
            refused.append(f"{linear}: {error}")
            continue
        rows.append({"name": linear, "error": json_number(found)})
        worst = found if math.isnan(found) else max(worst, found)
        if not found <= tolerance:
            problems.append(f"{linear}: the kernel is {found:.1e} off, relative; at most {tolerance}")
        log.debug("%s: kernel error %.1e", linear, found)
    if refused:
        raise CannotRun(
            f"the kernel cannot hold {len(refused)} of {len(layouts)} linears, the first {refused[0]}; "
            f"{len(rows)} were compared, the whole model was not run"
        )
    text = _run_kernel(subject)
    if not text.divergence <= KERNEL_DIVERGENCE:
        problems.append(
            f"the whole model on the kernel has divergence {text.divergence:.1e}, at most {KERNEL_DIVERGENCE}"
        )
    if not text.margin <= KERNEL_MARGIN:
        problems.append(
            f"a greedy token on the kernel is {text.margin:.2g} nats less likely than that of the same "
            f"weights dequantized, at most {KERNEL_MARGIN}"
        )
    summary = (
        f"{len(rows)} linears at {len(BATCHES)} batch sizes on {torch.cuda.get_device_name(subject.device)}, "
        f"relative error at most {worst:.1e}; whole model: divergence {text.divergence:.1e}, "
        f"{text.agreement:.2%} of the greedy tokens, others within {text.margin:.1e} nats"
    )
    return verdict(problems, summary, tolerance=tolerance, linears=rows, model=json_numbers(asdict(text)))


def _kernel_error(layer: QuantizedLinear, format: str, device: torch.device) -> float:
    """The largest error of the kernel's product from the one in float64 over the batch sizes, relative."""
    from marlin_convert.kernels.matmul import reference

    kernel = _on_kernel(layer, format, device)
    here = replace(layer, codes=layer.codes.to(device), scales=layer.scales.to(device), zeros=None)
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(max(BATCHES), layer.k, device=device, dtype=torch.float16, generator=draw)
    expected = reference(x, here)
    errors = []
    for batch in BATCHES:
        off = kernel(x[:batch]).double() - expected[:batch]
        errors.append((off.norm() / expected[:batch].norm()).item())
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _run_kernel(subject: Subject) -> Comparison:
    """The model on the kernel beside the model of the same weights, on random tokens."""
    models = [
        kind(subject.weights, subject.device, fast=False, trust_remote_code=subject.trust_remote_code)
        for kind in (BlockModel, _OnKernel)
    ]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(subject.model.config.get_text_config().vocab_size, (4, 256), generator=draw)
    return compare(models[0], models[1], ids)


class _OnKernel(BlockModel):
    """The checkpoint with every packed linear multiplied by the kernel."""

    def load(self, i: int) -> nn.Module:
        """Block i, as the kernel takes it."""
        block = super().load(i)
        for path, module in block.named_modules():
            linear = f"{self.name(i)}.{path}"
            if isinstance(module, nn.Linear) and self.weights.is_packed(linear):
                layer, format = self.weights.quantized(linear), self.weights.scheme_of(linear).format
                kernel = _on_kernel(layer, format, self.device, module.bias)
                module.forward = kernel.forward  # type: ignore[method-assign]
        return block

    def unload(self, i: int) -> None:
        """Free the weights of block i."""
        for module in self.blocks[i].modules():
            module.__dict__.pop("forward", None)
        super().unload(i)


def _on_kernel(
    layer: QuantizedLinear, format: str, device: torch.device, bias: Tensor | None = None
) -> nn.Module:
    """A layer as the module that runs its layout's kernel, or marlin's where its layout has none.

    FormatError when that kernel's layout cannot hold it.
    """
    from marlin_convert.kernels.matmul import LINEARS

    layout = format if format in LINEARS else "marlin"
    return LINEARS[layout](**formats.FORMATS[layout].pack(layer), bias=bias).to(device)
