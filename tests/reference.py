"""What quantizing a Llama one linear after another means, in plain torch and transformers: nothing of ours.

GPTQ is that of arXiv 2210.17323: columns in order of falling diag(H), the Cholesky factor of the inverse; a
group's scale is the one of a grid with the least squared error of its weights, weighed with diag(H).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

ATTENTION, MLP = "self_attn.", "mlp."
STAGES = (
    (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj"),
    (ATTENTION + "o_proj",),
    (MLP + "gate_proj", MLP + "up_proj"),
    (MLP + "down_proj",),
)


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def walk(model: PreTrainedModel, ids: Tensor, solve: Callable[[str, Tensor, Tensor], Tensor]) -> dict:
    """Give every linear the weight solve(name, W, x), x what all linears before leave it; relative errors."""
    errors, seen = {}, []
    for number, layer in enumerate(model.model.layers):
        for stage in STAGES:
            seen.clear()
            first = layer.get_submodule(stage[0])
            hook = first.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
            model(ids)
            hook.remove()
            for path in stage:
                linear, x = layer.get_submodule(path), seen[0].double()
                new = solve(f"model.layers.{number}.{path}", linear.weight.clone(), x).float()
                off, whole = x @ (linear.weight - new).double().T, x @ linear.weight.double().T
                errors[f"model.layers.{number}.{path}"] = (off.norm() / whole.norm()).item()
                linear.weight.copy_(new)
    return errors


def gptq(weight: Tensor, x: Tensor, group: int = 128, damping: float = 0.1) -> Tensor:
    """The dequantized weight (n, k) of 4 bits for inputs x (tokens, k)."""
    w, hessian = weight.double().T.clone(), x.T @ x / len(x)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    grid = w.abs().reshape(-1, group, w.shape[1]).amax(1) / 7.5 * torch.linspace(0.6, 1.1, 26)[:, None, None]
    scales = grid.half().double().repeat_interleave(group, 1)
    away = ((w / scales).round().clamp(-8, 7) * scales - w).square() * hessian.diagonal()[:, None]
    best = away.reshape(len(scales), -1, group, w.shape[1]).sum(2).argmin(0)
    scale = scales[:, ::group].gather(0, best[None])[0].repeat_interleave(group, 0)
    order = hessian.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    w, scale, found = w[order], scale[order], torch.empty_like(w)
    for i in range(len(w)):
        found[i] = (w[i] / scale[i]).round().clamp(-8, 7) * scale[i]
        w[i + 1 :] -= upper[i, i + 1 :, None] * ((w[i] - found[i]) / upper[i, i])
    return torch.empty_like(found).index_copy_(0, order, found).T


@torch.no_grad()
def divergence(source: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> float:
    """The mean over predicted tokens of sum p log(p / q), p of the source, in nats."""
    p, q = (one(ids).logits[:, :-1].double().log_softmax(-1) for one in (source, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()
