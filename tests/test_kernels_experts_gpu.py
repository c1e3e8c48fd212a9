"""The kernels for experts on a GPU: right for every shape and routing, and the same every time."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import sanitizer
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from marlin_convert.errors import KernelError
from marlin_convert.formats import Scheme, marlin
from marlin_convert.kernels import experts as kernels
from marlin_convert.kernels.configurations import Configuration, choose_for_experts
from marlin_convert.kernels.experts import GroupedExperts, Stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# largest error of the output, relative in the 2-norm; to round weights, what lies between, answers and
# output takes 2.0e-4 and 1.7e-3 each
TOLERANCE = {torch.float16: 7e-4, torch.bfloat16: 5.5e-3}


@pytest.fixture(autouse=True)
def _numbers() -> Iterator[None]:
    """The same numbers every time, and nothing but NaN where nobody has written."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    weights.cache_clear()


def stack(count: int, k: int, n: int, group_size: int, bias: torch.dtype | None = None) -> Stack:
    groups = 1 if group_size == -1 else k // group_size
    B = torch.randint(-(2**31), 2**31 - 1, (count, k // 16, 2 * n), dtype=torch.int32, device="cuda")
    s = (torch.rand(count, groups, n, device="cuda") + 0.1) * k**-0.5 * 0.3
    s *= torch.randint(0, 2, s.shape, device="cuda") * 2 - 1
    return Stack(B, s.half(), None if bias is None else torch.randn(count, n, device="cuda", dtype=bias))


@cache
def weights(one: Stack) -> list[Tensor]:
    """Of every expert, (n, k) float64."""
    groups = one.s.shape[1]
    scheme = Scheme("marlin", 4, -1 if groups == 1 else one.k // groups)
    pairs = zip(one.B, one.s, strict=True)
    return [
        marlin.unpack({"B": B.contiguous(), "s": s.contiguous()}, scheme).dequantize(torch.float64)
        for B, s in pairs
    ]


def routing(m: int, count: int, choices: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shares, index = torch.rand(m, count, device="cuda").softmax(-1).topk(choices)
    return index, (shares / shares.sum(-1, keepdim=True)).to(dtype)


def reference(
    gate: Stack, up: Stack, down: Stack, x: Tensor, index: Tensor, shares: Tensor,
    act: Callable[[Tensor], Tensor] = silu,
) -> Tensor:  # fmt: skip
    """The same sum in float64, what lies between rounded to the type of x."""
    y = torch.zeros(len(x), down.n, dtype=torch.float64, device="cuda")

    def product(one: Stack, expert: int, x: Tensor) -> Tensor:
        found = x.double() @ weights(one)[expert].t()
        return found if one.bias is None else found + one.bias[expert].double()

    for expert in range(len(gate.B)):
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        if len(tokens):
            inner = act(product(gate, expert, x[tokens])) * product(up, expert, x[tokens])
            answer = product(down, expert, inner.to(x.dtype))
            y.index_add_(0, tokens, answer * shares[tokens, choices].double()[:, None])
    return y


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


# experts, k, inner, choices
SHAPES = [(8, 256, 128, 2), (5, 192, 320, 3), (64, 1024, 192, 6), (512, 128, 64, 4), (16, 2048, 768, 8)]


def families(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels of this GPU, and those that every one of them has."""
    yield "own"
    for other in ((8, 0), (8, 6)):
        with monkeypatch.context() as patched:
            patched.setattr(
                kernels, "choose_for_experts",
                lambda *given, other=other: choose_for_experts(*given[:-2], other, given[-1]),
            )  # fmt: skip
            yield str(other)


@pytest.mark.parametrize("count, k, inner, choices", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [64, -1, 128])
def test_every_shape(
    count: int, k: int, inner: int, choices: int, dtype: torch.dtype, group_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if group_size == 128 and (k % 128 or inner % 128):
        group_size = 32
    bias = dtype if count in (5, 64) else None
    gate, up = (stack(count, k, inner, group_size, bias) for _ in range(2))
    down = stack(count, inner, k, group_size, bias)
    for family in families(monkeypatch):
        layer = GroupedExperts((gate, up), down)
        for m in (1, 3, 17, 64, 500):
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            index, shares = routing(m, count, choices)
            y = layer(x, index, shares)
            expected = reference(gate, up, down, x, index, shares)
            away = error(y, expected)
            assert away <= TOLERANCE[dtype], (family, m)
            assert torch.equal(layer(x, index, shares), y), (family, m)


TILES = [("stream", 8, 3), ("stream", 8, 2), ("stream", 16, 3)]
TILES += [
    *(("wgmma", tokens, 2) for tokens in (16, 32, 64, 80, 128, 144)),
    *(("mma", tokens, 2) for tokens in (8, 16)),
    *(("multistage", tokens, 2) for tokens in (16, 32, 64, 96, 128)),
]


@pytest.mark.parametrize("kernel, tokens, teams", TILES)
@pytest.mark.parametrize("fused", [True, False])
def test_every_tile_takes_every_number_of_tokens(
    kernel: str, tokens: int, teams: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel in ("stream", "wgmma") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{kernel} needs a Hopper")
    first, last = (
        Configuration(kernel, tokens, teams, 128, False, experts=True, paired=one) for one in (fused, False)
    )
    monkeypatch.setattr(kernels, "choose_for_experts", lambda *_: (first, last))
    gate, up, down = (stack(4, *shape, 128) for shape in ((1024, 384), (1024, 384), (384, 1024)))

    def activation(both: Tensor) -> Tensor:
        return silu(both[:, :384]) * both[:, 384:]

    layer = GroupedExperts((gate, up), down, None if fused else activation)
    for counts in ((1, 0, 0, 0), (0, 0, 0, 7), (tokens, tokens + 1, tokens - 1, 1), (300, 0, 5, 2 * tokens)):
        index = torch.arange(4, device="cuda").repeat_interleave(torch.tensor(counts, device="cuda"))
        index = index[torch.randperm(len(index), device="cuda"), None]
        x = torch.randn(len(index), 1024, device="cuda", dtype=torch.float16)
        shares = torch.rand(len(index), 1, device="cuda", dtype=torch.float16)
        y = layer(x, index, shares)
        assert error(y, reference(gate, up, down, x, index, shares)) <= 7e-4, counts


def test_another_activation_than_silu() -> None:
    gate, up, down = (stack(8, *shape, 64) for shape in ((512, 192), (512, 192), (192, 512)))
    layer = GroupedExperts((gate, up), down, lambda both: gelu(both[:, :192]) * both[:, 192:])
    x = torch.randn(33, 512, device="cuda", dtype=torch.float16)
    index, shares = routing(33, 8, 2, torch.float16)
    assert error(layer(x, index, shares), reference(gate, up, down, x, index, shares, gelu)) <= 7e-4


def test_experts_without_a_gate() -> None:
    up, down = stack(8, 512, 192, 64), stack(8, 192, 512, 64)
    x = torch.randn(33, 512, device="cuda", dtype=torch.float16)
    index, shares = routing(33, 8, 2, torch.float16)
    y = GroupedExperts((up,), down, lambda one: one.relu())(x, index, shares)

    expected = torch.zeros(33, 512, dtype=torch.float64, device="cuda")
    for expert in range(8):
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        inner = (x[tokens].double() @ weights(up)[expert].t()).relu().half().double()
        answer = inner @ weights(down)[expert].t()
        expected.index_add_(0, tokens, answer * shares[tokens, choices].double()[:, None])
    assert error(y, expected) <= 7e-4


def test_gate_and_up_may_be_columns_of_one_tensor() -> None:
    both, down = stack(8, 512, 384, 64), stack(8, 192, 512, 64)
    gate = Stack(both.B[..., :384], both.s[..., :192])
    up = Stack(both.B[..., 384:], both.s[..., 192:])
    x = torch.randn(33, 512, device="cuda", dtype=torch.float16)
    index, shares = routing(33, 8, 2)
    assert (
        error(GroupedExperts((gate, up), down)(x, index, shares), reference(gate, up, down, x, index, shares))
        <= 7e-4
    )


def test_experts_that_are_elsewhere_answer_nothing() -> None:
    gate, up, down = (stack(4, *shape, 128) for shape in ((256, 128), (256, 128), (128, 256)))
    layer = GroupedExperts((gate, up), down)
    x = torch.randn(40, 256, device="cuda", dtype=torch.float16)
    index, shares = routing(40, 16, 4)
    index[3] = -1  # nobody's
    index[4] = 99
    here = torch.full((16,), -1, dtype=torch.int32, device="cuda")
    here[[9, 2, 4, 15]] = torch.arange(4, dtype=torch.int32, device="cuda")
    known = here[index.clamp(0, 15)].where((index >= 0) & (index < 16), -1)
    y = layer(x, index.int(), shares, here)
    assert error(y, reference(gate, up, down, x, known, shares)) <= 7e-4
    assert not y[3:5].any()


def test_many_choices_are_put_in_order() -> None:
    """Each warp of the ordering block has its part of them, the last one less than that."""
    gate, up, down = (stack(300, *shape, 64) for shape in ((128, 64), (128, 64), (64, 128)))
    layer = GroupedExperts((gate, up), down)
    for m in (1001, 6000):
        x = torch.randn(m, 128, device="cuda", dtype=torch.float16)
        index, shares = routing(m, 300, 8)
        index[torch.rand_like(shares) < 0.1] = -1
        y = layer(x, index, shares)
        assert error(y, reference(gate, up, down, x, index, shares)) <= 7e-4, m


def test_graphs_are_captured_and_give_the_same_bits() -> None:
    gate, up, down = (stack(16, *shape, 128) for shape in ((1024, 256), (1024, 256), (256, 1024)))
    layer = GroupedExperts((gate, up), down)
    x = torch.randn(20, 1024, device="cuda", dtype=torch.float16)
    index, shares = routing(20, 16, 4)
    expected = layer(x, index, shares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(layer(x, index, shares), index, shares)
    for _ in range(3):
        new = torch.randn_like(x)
        other, _ = routing(20, 16, 4)
        x.copy_(new)
        index.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(layer(x, index, shares), index, shares))
    assert not torch.equal(y, expected)


def test_what_does_not_fit_is_refused() -> None:
    gate, up, down = (stack(4, *shape, 128) for shape in ((256, 128), (256, 128), (128, 256)))
    layer = GroupedExperts((gate, up), down)
    x = torch.randn(4, 256, device="cuda", dtype=torch.float16)
    index, shares = routing(4, 4, 2)
    for given in (
        (x.float(), index, shares),
        (x[:, :128], index, shares),
        (x, index[:3], shares),
        (x, index.float(), shares),
        (x, index, shares[:, :1]),
        (x, index.cpu(), shares),
    ):
        with pytest.raises(KernelError):
            layer(*given)
    with pytest.raises(KernelError):
        GroupedExperts((gate, up), gate)
    with pytest.raises(KernelError):
        Stack(gate.B[:, :, ::2], gate.s)
    assert layer(x[:0], index[:0], shares[:0]).shape == (0, 256)


PROGRAM = """
from importlib import import_module
import torch
from marlin_convert.kernels.configurations import choose_for_experts
from marlin_convert.kernels.experts import GroupedExperts, Stack

OTHER = None
module = import_module("marlin_convert.kernels.experts")
module.choose_for_experts = lambda *given: choose_for_experts(*given[:4], OTHER or given[4], *given[5:])

def stack(count, k, n):
    B = torch.full((count, k // 16, 2 * n), 0x12345678, dtype=torch.int32, device="cuda")
    return Stack(B, torch.full((count, k // 64, n), 0.01, dtype=torch.half, device="cuda"))

for OTHER in (None, (8, 6)):
  for count, k, inner, choices in ((16, 256, 192, 4), (5, 512, 320, 2), (70, 128, 64, 8)):
      grouped = GroupedExperts((stack(count, k, inner), stack(count, k, inner)), stack(count, inner, k))
      for m in (1, 3, 16, 65, 200):
          x = torch.ones(m, k, dtype=torch.half, device="cuda")
          shares, index = torch.rand(m, count, device="cuda").topk(choices)
          grouped(x, index, shares)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool: str) -> None:
    sanitizer.check(tool, PROGRAM)
