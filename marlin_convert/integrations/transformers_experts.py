"""Packed experts in transformers: on a GPU the tokens of all of them are multiplied at once."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

from marlin_convert.kernels.experts import MOST, GroupedExperts, Stack
from marlin_convert.kernels.matmul import DTYPES, MarlinLinear
from marlin_convert.models.experts import Experts

# Not in the modules, which are copied and pickled.
_grouped: WeakKeyDictionary[torch.nn.Module, GroupedExperts] = WeakKeyDictionary()


class PackedExperts(Experts):
    """Experts of which every linear is packed, by one format.

    On a GPU those in MARLIN's layout go through the kernel for all tokens at once, if no gradient is asked
    for; else one expert after another.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of Experts."""
        if not self._fits(hidden_states, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        shares = top_k_weights if top_k_weights.dtype == hidden_states.dtype else top_k_weights.float()
        return self._stacked()(hidden_states, top_k_index, shares)

    def _fits(self, x: Tensor, shares: Tensor) -> bool:
        differentiated = torch.is_grad_enabled() and (x.requires_grad or shares.requires_grad)
        return (
            x.is_cuda
            and x.dtype in DTYPES
            and not differentiated
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cuda")
            and not self.has_post_expert_norm
            and self.count <= MOST
            and all(isinstance(self.linear(0, role), MarlinLinear) for role in self.roles)
        )

    def _stacked(self) -> GroupedExperts:
        """The experts with the tensors of a role in one; the linears have their parts of it from now on."""
        found = _grouped.get(self)
        if found is None or not all(map(self._is_of, self.roles, (*found.first, found.down))):
            *first, down = (self._stack(role) for role in self.roles)
            found = _grouped[self] = GroupedExperts(first, down, self._activation())
        return found

    def _is_of(self, role: str, stack: Stack) -> bool:
        return all(
            self.linear(number, role).get_buffer("B").data_ptr() == stack.B[number].data_ptr()
            for number in (0, self.count - 1)
        )

    def _stack(self, role: str) -> Stack:
        tensors: dict[str, Tensor | None] = {}
        linears = [self.linear(number, role) for number in range(self.count)]
        for name in ("B", "s", "bias"):
            parts: list[Any] = [linear._buffers[name] for linear in linears]
            tensors[name] = None if parts[0] is None else torch.stack(parts)
            for number, linear in enumerate(linears):
                linear._buffers[name] = None if parts[0] is None else tensors[name][number]  # type: ignore[index]
        return Stack(**tensors)  # type: ignore[arg-type]

    def _activation(self) -> Callable[[Tensor], Tensor] | None:
        """What makes the input of the last linear; None for what the kernel does itself."""
        if len(self.roles) == 2:
            return self.act_fn
        interleaved = self.stacks[0].interleaved
        plain = getattr(self._apply_gate, "__func__", None) is _default_apply_gate
        if plain and not interleaved and type(self.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            return None

        def gated(both: Tensor) -> Tensor:
            if interleaved:
                both = both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            return self._apply_gate(both)

        return gated
