"""The hidden states of a text between two decoder blocks, kept where there is room for them."""

import os
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.memory import free_memory

# Tokens of one micro-batch: enough to fill the device, few enough for a forward's temporaries to stay small.
TOKENS = {"cpu": 2048, "cuda": 16384}


class HiddenStates:
    """What enters the next block, for every micro-batch of a text.

    They stay on the device while they take less than a quarter of its free memory, else in host memory, and
    past a quarter of that in a file of `directory`.
    """

    def __init__(self, model: BlockModel, ids: Tensor, directory: Path | None = None):
        """Embed ids (samples, length), one micro-batch of whole samples after another."""
        self.model = model
        samples, length = ids.shape
        self.batches = ids.split(max(1, TOKENS[model.device.type] // length))
        self._calls: dict[int, list[dict[str, Any]]] = {}
        for i, batch in enumerate(self.batches):
            hidden, calls = model.embed(batch)
            self._calls.setdefault(len(batch), calls)
            if i == 0:
                self._states = self._room((samples, *hidden.shape[1:]), model.dtype, directory)
            self._states[i].copy_(hidden)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, directory: Path | None) -> tuple[Tensor, ...]:
        size = torch.Size(shape).numel()
        device = self.model.device
        nbytes = size * dtype.itemsize
        if device.type == "cuda" and 4 * nbytes < free_memory(device):
            states = torch.empty(shape, dtype=dtype, device=device)
        elif directory is None or 4 * nbytes < free_memory(torch.device("cpu")):
            states = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            path = directory / "hidden_states.bin"
            with path.open("w+b") as file:
                path.unlink()  # the space is given back with the mapping, even after a kill
                file.truncate(nbytes)
                if hasattr(os, "posix_fallocate"):  # on a full disk an error here, not a dead process later
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                states = torch.frombuffer(mmap(file.fileno(), nbytes), dtype=dtype).view(shape)
        return states.split(max(1, len(self.batches[0])))

    def __len__(self) -> int:
        return len(self.batches)

    def forward(self, i: int, block: nn.Module, number: int) -> Tensor:
        """The output of decoder block `number` for micro-batch i, (batch, length, hidden)."""
        calls = self._calls[len(self.batches[i])]
        output = block(self.state(i), **calls[number])
        return output if isinstance(output, Tensor) else output[0]

    def state(self, i: int) -> Tensor:
        """Micro-batch i on the device."""
        return self._states[i].to(self.model.device, self.model.compute_dtype, non_blocking=True)

    def put(self, i: int, output: Tensor) -> None:
        """Let micro-batch i go on to the next block as `output`."""
        self._states[i].copy_(output)

    def finite(self) -> bool:
        """Whether no micro-batch holds NaN or infinity."""
        return all(bool(torch.stack(torch.aminmax(state)).isfinite().all()) for state in self._states)

    def advance(self, block: nn.Module, number: int) -> None:
        """Take every micro-batch through a block."""
        with torch.no_grad():
            for i in range(len(self)):
                self.put(i, self.forward(i, block, number))
