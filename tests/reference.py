"""What quantizing a Llama one linear after another means, in plain torch and transformers: nothing of ours.

The original runs beside it, so that a weight makes up for what its inputs, and what its outputs are added to,
have become. GPTQ is that of arXiv 2210.17323: columns in order of falling diag(H), the Cholesky factor of
the inverse; a group's scale is the one of a grid with the least squared error of its weights, weighed with
diag(H).
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


def seen_by(
    model: PreTrainedModel, ids: Tensor, number: int, stage: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """The inputs (tokens, k) of a stage of a layer, and what its outputs are added to, or 0."""
    layer, seen = model.model.layers[number], {}
    norm = {ATTENTION + "o_proj": "input_layernorm", MLP + "down_proj": "post_attention_layernorm"}
    watched = {"x": stage[0], "residual": norm.get(stage[0], "input_layernorm")}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, given, what=what: seen.__setitem__(what, given[0].flatten(0, 1).double())
        )
        for what, path in watched.items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["residual"] if stage[0] in norm else torch.zeros(())


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    ids: Tensor,
    solve: Callable[[str, Tensor, Tensor, Tensor], Tensor],
    original: PreTrainedModel,
) -> dict:
    """Give every linear the weight solve(name, W, x, y); relative errors.

    x are the inputs that all linears before leave it, y the outputs with which the sum that they go into
    would be the original's.
    """
    errors = {}
    for number, layer in enumerate(model.model.layers):
        for stage in STAGES:
            (x, residual), (before, added_to) = (
                seen_by(one, ids, number, stage) for one in (model, original)
            )
            for path in stage:
                linear, name = layer.get_submodule(path), f"model.layers.{number}.{path}"
                weight = original.get_submodule(name).weight.double()
                new = solve(name, linear.weight.clone(), x, before @ weight.T + added_to - residual).float()
                off, whole = x @ (weight - new).T, x @ weight.T
                errors[name] = (off.norm() / whole.norm()).item()
                linear.weight.copy_(new)
    return errors


def compensated(weight: Tensor, x: Tensor, y: Tensor, damping: float = 0.1) -> Tensor:
    """The weight (n, k) moved towards the ridge regression of y on x, the less the fewer tokens there are."""
    share = 0.75 / (1 + 16 * x.shape[1] / len(x))
    ridge = (damping * x.square().mean() * len(x)).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    right = torch.cat((y, ridge @ weight.double().T))
    return torch.lerp(weight.double(), torch.linalg.lstsq(torch.cat((x, ridge)), right).solution.T, share)


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
