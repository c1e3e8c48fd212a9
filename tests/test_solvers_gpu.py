"""The GPU's block loop against the CPU's: the same numbers up to rounding."""

from pathlib import Path

import diverse_models
import pytest
import test_solvers_sparsity
import tiny_models
import torch
from click.testing import CliRunner
from test_solvers import objective

from marlin_convert import solve as walk
from marlin_convert.cli.main import main
from marlin_convert.solvers import gptq, scales, sparsity
from marlin_convert.solvers.factor import Factor, diagonals
from marlin_convert.solvers.gptq import Solution, solve
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


def weight_error(
    found: Solution, weight: torch.Tensor, hessian: torch.Tensor, group_size: int
) -> torch.Tensor:
    """e^T H e of all outputs of a weight (n, k), float64."""
    return objective(Solution(found.codes.cpu(), found.scales.cpu(), None), weight, hessian, group_size).sum()


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
    hessian = x.float().T @ x.float() / len(x)
    errors = [weight_error(one, weight, hessian, group_size) for one in (gpu, cpu)]
    torch.testing.assert_close(*errors, rtol=5e-3, atol=0)


def batch(k: int, n: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (count, n, k) and Hessians (count, k, k), one of them of no inputs at all."""
    generator = torch.Generator().manual_seed(k)
    x = inputs(count * 2048, k).float().view(count, 2048, k)
    hessians = x.mT @ x / 2048
    hessians[1] = 0
    return torch.randn(count, n, k, generator=generator) * 0.02, hessians


@pytest.mark.parametrize(("k", "n", "group_size"), [(512, 256, 128), (200, 100, 40), (768, 2048, 128)])
def test_a_batch_has_the_solutions_of_each(k: int, n: int, group_size: int) -> None:
    weights, hessians = batch(k, n, 5)
    settings = {"bits": 4, "group_size": group_size, "sweeps": 2}
    found, again = (
        gptq.solve_batch(weights.cuda(), Factor(hessians.cuda(), 0.05), **settings) for _ in range(2)
    )
    assert [one.damping for one in found] == [0.05, None, 0.05, 0.05, 0.05]
    for one, other, weight, hessian in zip(found, again, weights, hessians, strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
        for device in ("cuda", "cpu"):
            alone = solve(weight.to(device), hessian.to(device), damping=0.05, **settings)
            assert (one.scales != alone.scales.cuda()).float().mean() < 1e-3
            assert (one.codes == alone.codes.cuda()).float().mean() > 0.97
            errors = [weight_error(found, weight, hessian, group_size) for found in (one, alone)]
            torch.testing.assert_close(*errors, rtol=5e-3, atol=0)


@pytest.mark.parametrize("rows", [slice(0, 128), slice(128, 192), slice(40, 115)])
def test_a_block_of_a_batch_is_rounded_as_torch_does(rows: slice) -> None:
    """With feedback that has rows or columns first in memory; nothing beside the rows is written."""
    from marlin_convert.solvers.gptq_triton import round_block

    random = torch.Generator("cuda").manual_seed(1)
    w, before, target, scales, feedback = (
        torch.randn(3, *shape, generator=random, device="cuda")
        for shape in ((192, 100), (192, 100), (128, 100), (6, 100), (192, 192))
    )
    groups = torch.randint(6, (3, 192), generator=random, device="cuda")
    scales = scales.abs() + 0.1
    target = target[:, : rows.stop - rows.start].contiguous()
    for laid_out in (feedback.mul_(0.1), feedback.mT.contiguous().mT):
        found, expected = ((before.clone(), torch.full_like(before, 99, dtype=torch.int8)) for _ in range(2))
        for of_one, block in ((found, round_block), (expected, gptq._round_block)):
            block(rows, target.clone(), w, scales, groups, laid_out[:, rows, rows], *of_one, 4)
        right = found[1] == expected[1]
        assert right[:, rows].float().mean() > 0.999
        torch.testing.assert_close(found[0][right], expected[0][right], rtol=1e-4, atol=1e-3)
        others = [row for row in range(192) if not rows.start <= row < rows.stop]
        assert torch.equal(found[0][:, others], before[:, others]) and (found[1][:, others] == 99).all()


@pytest.mark.parametrize("positive", [False, True])
def test_scales_of_a_batch_are_those_of_each(positive: bool) -> None:
    weights, hessians = (x.cuda() for x in batch(512, 100, 3))
    wt, importance = weights.mT.contiguous(), diagonals(hessians) + 1e-3
    together = scales.search_scales(wt, importance, 64, 4, positive=positive)
    for one, weight, weighed in zip(together, wt, importance, strict=True):
        alone = scales.search_scales(weight, weighed.contiguous(), 64, 4, positive=positive)
        assert torch.equal(one, alone)
        on_cpu = scales.search_scales(weight.cpu(), weighed.cpu(), 64, 4, positive=positive)
        assert (one.cpu() != on_cpu).float().mean() < 1e-3


def test_the_bytes_that_a_weight_of_a_batch_takes() -> None:
    weights, hessians = (x.cuda() for x in batch(2048, 512, 6))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - hessians.nbytes
    gptq.solve_batch(weights, Factor(hessians, 0.05), bits=4, group_size=128, sweeps=2)
    most = torch.cuda.max_memory_allocated() - before + hessians.nbytes  # with the products
    assert 0.7 < most / (6 * gptq.bytes_taken(2048, 512)) < 1.1


def test_a_mixture_has_the_same_bytes_again_and_when_it_goes_on(tmp_path: Path, monkeypatch) -> None:
    """Three experts at once and then one; the second run was stopped after two of four blocks."""
    monkeypatch.setattr(walk, "experts_at_once", lambda *_: 3)
    model = diverse_models.build("qwen3_moe", vocab_size=4096).to(torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "source")
    text, runner = ["--samples", "64", "--sequence-length", "256", "--format", "gptq"], CliRunner()
    block = walk.Solve.block

    def stopped(self: walk.Solve, number: int):
        if number == 2:
            raise KeyboardInterrupt
        return block(self, number)

    files = []
    for name in ("once", "again", "resumed"):
        words = ["quantize", str(source), "-o", str(tmp_path / name), "--device", "cuda", *text]
        if name == "resumed":
            with monkeypatch.context() as patch:
                patch.setattr(walk.Solve, "block", stopped)
                assert runner.invoke(main, words).exit_code == 130
            words.append("--resume")
        done = runner.invoke(main, words)
        assert done.exit_code == 0, done.output
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] == files[2]
    checked = runner.invoke(main, ["verify", str(tmp_path / "once"), "--source", str(source)])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("k", "n", "group_size"), [(512, 256, 128), (1536, 320, 128), (896, 64, 64), (256, 100, 256)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_sparse_solution_is_the_cpu_s(k: int, n: int, group_size: int, masked: bool, sweeps: int) -> None:
    x = inputs(4096, k).float()
    hessian = x.T @ x / len(x)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    given = sparsity.choose_mask(weight, hessian, method="wanda") if masked else None
    found, pruned = {}, {}
    for device in ("cpu", "cuda"):
        mask = given if given is None else given.to(device)
        at = weight.to(device), hessian.to(device)
        found[device] = test_solvers_sparsity.solve(
            *at, bits=4, group_size=group_size, damping=0.05, sweeps=sweeps, mask=mask
        )
        pruned[device] = test_solvers_sparsity.prune(*at, damping=0.05, sweeps=sweeps, mask=mask)
    cpu, gpu = found["cpu"], found["cuda"]
    assert cpu.mask is not None and gpu.mask is not None
    assert (gpu.mask.view(-1, 4, n).sum(1) == 2).all() and (gpu.codes[~gpu.mask] == 8).all()
    if given is not None:
        assert torch.equal(gpu.mask.cpu(), given) and torch.equal(pruned["cuda"][1].cpu(), given)
    # one code off moves the later ones of its output, and the masks that suit them: on the CPU a Hessian that
    # is 1e-6 off changes a third of these codes, and the error by three in a thousand
    assert (gpu.codes.cpu() == cpu.codes).float().mean() > (0.9 if masked else 0.6)
    assert (pruned["cuda"][1].cpu() == pruned["cpu"][1]).float().mean() > 0.8
    errors = [weight_error(one, weight, hessian, group_size) for one in (gpu, cpu)]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=0)


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
        solver = test_solvers_sparsity.solve if sparse else solve
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
