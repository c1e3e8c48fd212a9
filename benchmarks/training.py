"""The training of the small models that benchmarks measure on: AdamW, a warm rate that falls."""

import math
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel


def train(model: PreTrainedModel, ids: Tensor, *, batch: int, rate: float, last: float, say: int) -> None:
    """Train on all ids (samples, length), so many at a time; `last` is the share of the rate at the end.

    The loss is said every `say` steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    started, steps = time.perf_counter(), len(ids) // batch
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / 30), step / steps
        fall = (1 + last) / 2 + (1 - last) / 2 * math.cos(math.pi * done)
        optimizer.param_groups[0]["lr"] = rate * warm * fall
        some = ids[step * batch : (step + 1) * batch].to(model.device)
        loss = model(input_ids=some, labels=some).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % say == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
