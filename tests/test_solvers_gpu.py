"""The GPU's block loop against the CPU's: the same numbers up to rounding."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from marlin_convert.cli.main import main
from marlin_convert.solvers import sparsity
from marlin_convert.solvers.gptq import solve
from marlin_convert.solvers.hessian import Hessian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def inputs(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    mixing = torch.randn(k, k, generator=generator) / k**0.5
    spread = torch.logspace(0, 1.5, k)
    return (torch.randn(tokens, k, generator=generator) * spread @ mixing).bfloat16()


@pytest.mark.parametrize(
    ("k", "n", "group_size"), [(512, 256, 128), (1536, 320, 128), (896, 64, 64), (256, 100, 256)]
)
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("positive", [False, True])
def test_solution_is_the_cpu_s(k: int, n: int, group_size: int, sweeps: int, positive: bool) -> None:
    x = inputs(4096, k)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    found = {}
    for device in ("cpu", "cuda"):
        hessian = Hessian(k, torch.device(device))
        for batch in x.split(1000):
            hessian.add(batch.to(device))
        found[device] = solve(
            weight.to(device), hessian.mean(),
            bits=4, group_size=group_size, damping=0.05, sweeps=sweeps, positive=positive,
        )  # fmt: skip
    cpu, gpu = found["cpu"], found["cuda"]
    assert torch.equal(gpu.scales.cpu(), cpu.scales) or (gpu.scales.cpu() != cpu.scales).float().mean() < 1e-3
    # one code off moves the later ones of its output, so codes agree mostly and the error to a hair
    assert (gpu.codes.cpu() == cpu.codes).float().mean() > 0.97
    torch.testing.assert_close(gpu.error.sum().cpu(), cpu.error.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("k", "n", "group_size"), [(512, 256, 128), (1536, 320, 128), (896, 64, 64), (256, 100, 256)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_sparse_solution_is_the_cpu_s(k: int, n: int, group_size: int, masked: bool, sweeps: int) -> None:
    x = inputs(4096, k).float()
    hessian = x.T @ x / len(x)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    given = sparsity.choose_mask(weight, hessian, method="wanda", damping=0.05) if masked else None
    found, pruned = {}, {}
    for device in ("cpu", "cuda"):
        mask = given if given is None else given.to(device)
        at = weight.to(device), hessian.to(device)
        found[device] = sparsity.solve(
            *at, bits=4, group_size=group_size, damping=0.05, sweeps=sweeps, mask=mask
        )
        pruned[device] = sparsity.prune(*at, damping=0.05, sweeps=sweeps, mask=mask)
    cpu, gpu = found["cpu"], found["cuda"]
    assert cpu.mask is not None and gpu.mask is not None
    assert (gpu.mask.view(-1, 4, n).sum(1) == 2).all() and (gpu.codes[~gpu.mask] == 8).all()
    if given is not None:
        assert torch.equal(gpu.mask.cpu(), given) and torch.equal(pruned["cuda"][1].cpu(), given)
    # one code off moves the later ones of its output, and the masks that suit them: on the CPU a Hessian that
    # is 1e-6 off changes a third of these codes, and the error by three in a thousand
    assert (gpu.codes.cpu() == cpu.codes).float().mean() > (0.9 if masked else 0.6)
    assert (pruned["cuda"][1].cpu() == pruned["cpu"][1]).float().mean() > 0.8
    torch.testing.assert_close(gpu.error.sum().cpu(), cpu.error.sum(), rtol=1e-2, atol=0)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("sparse", [False, True])
def test_a_solution_on_the_other_gpu_is_the_same(sparse: bool) -> None:
    """Triton would launch on the current one."""
    x = inputs(4096, 512)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    found = []
    for device in ("cuda:0", "cuda:1"):
        hessian = Hessian(512, torch.device(device))
        hessian.add(x.to(device))
        solver = sparsity.solve if sparse else solve
        done = solver(weight.to(device), hessian.mean(), bits=4, group_size=128, damping=0.05, sweeps=2)
        assert str(done.codes.device) == device
        found.append((done.codes.cpu(), done.scales.cpu()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@two_gpus
@pytest.mark.parametrize("more", [[], ["--sparsity", "2:4"]], ids=["dense", "2:4"])
def test_a_model_is_quantized_on_the_other_gpu_with_the_same_bytes(tinypy, tmp_path, more) -> None:
    text, runner = ["--samples", "8", "--sequence-length", "256"], CliRunner()
    weights = []
    for device in ("cuda:0", "cuda:1"):
        output = tmp_path / device.replace(":", "-")
        made = runner.invoke(
            main, ["quantize", str(tinypy), "-o", str(output), "--device", device, *text, *more]
        )
        assert made.exit_code == 0, made.output
        weights.append((output / "model.safetensors").read_bytes())
        checked = runner.invoke(
            main, ["verify", str(output), "--device", device, "--require-kernel", "--samples", "4"]
        )
        assert checked.exit_code == 0, checked.output
    assert weights[0] == weights[1]


def test_hessian_is_exact_in_float32() -> None:
    x = inputs(3000, 2304)
    hessian = Hessian(2304, torch.device("cuda"))
    hessian.add(x.cuda())
    exact = x.double().T @ x.double() / 3000
    torch.testing.assert_close(
        hessian.mean().cpu().double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item()
    )


def test_a_model_is_quantized_on_the_gpu_and_verified(tinypy: Path, tmp_path: Path) -> None:
    """The whole path: blocks read ahead on a stream of their own, solved, written behind, verified."""
    output, text = tmp_path / "out", ["--samples", "8", "--sequence-length", "256"]
    runner = CliRunner()
    made = runner.invoke(main, ["quantize", str(tinypy), "-o", str(output), "--device", "cuda", *text])
    assert made.exit_code == 0, made.output
    again = runner.invoke(main, ["quantize", str(tinypy), "-o", f"{output}-2", "--device", "cuda", *text])
    assert again.exit_code == 0, again.output
    weights = [(path / "model.safetensors").read_bytes() for path in (output, tmp_path / "out-2")]
    assert weights[0] == weights[1]
    checked = runner.invoke(main, ["verify", str(output), "--source", str(tinypy), "--samples", "4"])
    assert checked.exit_code == 0, checked.output
