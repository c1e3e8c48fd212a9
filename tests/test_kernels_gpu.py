"""The kernels on a GPU: right at every edge, the same every time, and never quietly wrong."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sanitizer
import torch

from marlin_convert.errors import KernelError
from marlin_convert.formats import FORMATS, marlin, marlin_24
from marlin_convert.kernels.configurations import (
    NARROW_CLUSTER,
    NARROW_TILES,
    TILES,
    Configuration,
    choose,
    schedule,
)
from marlin_convert.kernels.launch import Call
from marlin_convert.quantized import QuantizedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# largest error of the output, relative in the 2-norm; rounding it takes 2.0e-4 and 1.7e-3 already
TOLERANCE = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
BATCHES = (1, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 257, 1000)


def layer(k: int, n: int, group_size: int, seed: int = 0) -> QuantizedLinear:
    """Random codes and scales of both signs."""
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else k // group_size
    codes = torch.randint(0, 16, (k, n), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=draw) + 0.1) * 0.02
    scales *= torch.randint(0, 2, scales.shape, generator=draw) * 2 - 1
    return QuantizedLinear(codes=codes, scales=scales.half(), group_size=k // groups)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["narrow", "wide"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels as they are chosen, and those of layers that would have narrow tiles."""
    choose.cache_clear()
    if request.param == "wide":
        monkeypatch.setattr("marlin_convert.kernels.configurations.NARROW_TILES", {})
    yield
    choose.cache_clear()


def packed(one: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = marlin.pack(one)
    return tensors["B"].cuda(), tensors["s"].cuda()


def sparse_layer(k: int, n: int, group_size: int, seed: int = 0) -> QuantizedLinear:
    """A layer of which two random codes of every quad are kept."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(k // 4, 4, n, generator=draw).argsort(1).argsort(1).view(k, n) < 2
    one = layer(k, n, group_size, seed)
    return replace(one, codes=one.codes.where(kept, 8), kept=kept)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def tolerance(y: torch.Tensor) -> float:
    """Largest error of an output, more where few numbers make its mean."""
    return TOLERANCE[y.dtype] * (1 + 3 * y.numel() ** -0.5)


# Whose kernels run on this GPU too: with much shared memory, and with little.
OTHERS = ((8, 0), (8, 6))


def by_others(
    x: torch.Tensor, one: QuantizedLinear, bias: torch.Tensor | None
) -> Iterator[tuple[Configuration, torch.Tensor]]:
    """The products (m, n) of the kernels that other architectures would choose, in poisoned memory."""
    pack = marlin.pack if one.kept is None else marlin_24.pack
    tensors = {name: tensor.cuda() for name, tensor in pack(one).items()}
    B, s, B_meta = tensors.get("B", tensors.get("B_24")), tensors["s"], tensors.get("B_meta")
    (m, k), n = x.shape, s.shape[1]
    group = 0 if len(s) == 1 else k // len(s)
    chosen = {
        choose(m, n, k, group, x.dtype == torch.bfloat16, capability, B_meta is not None)
        for capability in OTHERS
    }
    for configuration in chosen:
        y = torch.full((m, n), float("nan"), device="cuda", dtype=x.dtype)
        Call(configuration, x, B, s, bias, B_meta)(x.data_ptr(), y.data_ptr())
        yield configuration, y


SHAPES = [(128, 64), (256, 320), (1024, 768), (4096, 4096), (14336, 1088)]
# The last chunk of these has half of its rows.
HALVES = [(64, 64), (192, 320), (576, 1536), (960, 4096), (1856, 2688), (10944, 1088)]


@pytest.mark.parametrize(
    "k, n, group_size",
    [
        *((*shape, group_size) for shape in SHAPES for group_size in (128, 64, 32, -1)),
        *((*shape, group_size) for shape in HALVES for group_size in (64, 32, -1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_edge(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    from marlin_convert.kernels.matmul import matmul, reference

    one = layer(k, n, group_size)
    B, s = packed(one)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for m in BATCHES:
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        for b in (None, bias):
            y = matmul(x, B, s, b)
            assert error(y, reference(x, one, b)) < tolerance(y), (m, b is not None)
            assert torch.equal(y, matmul(x, B, s, b)), "not the same twice"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize(
    "group_size, sparse", [*((size, False) for size in (128, 64, 32, -1)), (128, True), (-1, True)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_tile_of_hopper(dtype: torch.dtype, group_size: int, sparse: bool) -> None:
    """Whether it would be chosen or not; a narrow one by any number of blocks, with more and fewer chunks."""
    from marlin_convert.kernels.matmul import reference

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = [("stream", 8, 2, 4)] if sparse else [("stream", 8, 3, 4), ("stream", 16, 3, 4)]
    tiles += [("wgmma", tokens, 2, 4) for tokens in TILES]
    tiles += [("narrow", tokens, 2, columns) for columns in NARROW_TILES for tokens in NARROW_TILES[columns]]
    every = [
        Configuration(*tile, max(group_size, 0), dtype == torch.bfloat16, sparse, columns=columns)
        for *tile, columns in tiles
    ]
    met = set()
    shapes = [
        (128, 64),
        (256, 64),
        (1024, 320),
        (2560, 320),
        (1536, 2432),
        (3072, 2560),
        (4096, 4160),
        (256, 8640),
    ]
    for k, n in shapes + HALVES[1:-1]:
        if group_size == 128 and (k % 128 or k == 128):  # k == 128 is stored like -1, another case
            continue
        one = (sparse_layer if sparse else layer)(k, n, group_size)
        *weights, s = (tensor.cuda() for tensor in (marlin_24 if sparse else marlin).pack(one).values())
        bias = torch.randn(n, device="cuda", dtype=dtype)
        for m in (1, 8, 17, 64, 130):
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            expected = reference(x, one, bias)
            for configuration in every:
                tiles_of_m = configuration.tiles(m, n)
                if configuration.kernel == "narrow":
                    if tiles_of_m > processors:
                        continue
                    plan = schedule(configuration, tiles_of_m, configuration.chunks(k), processors)
                    met.add((configuration.columns, configuration.tokens, plan[3]))
                answers = torch.full((2, m, n), float("nan"), device="cuda", dtype=dtype)
                call = Call(configuration, x, weights[0], s, bias, *weights[1:])
                for y in answers:
                    call(x.data_ptr(), y.data_ptr())
                assert error(answers[0], expected) < tolerance(answers[0]), (k, n, m, configuration)
                assert torch.equal(*answers), "not the same twice"
    if processors == 132:
        assert met == {
            (columns, tokens, share)
            for columns, tiles_of in NARROW_TILES.items()
            for tokens in tiles_of
            for share in range(1, NARROW_CLUSTER + 1)
        }


@pytest.mark.parametrize("group_size", [128, 64, 32, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_kernels_of_other_architectures(dtype: torch.dtype, group_size: int) -> None:
    """They run on this one too."""
    from marlin_convert.kernels.matmul import reference

    met = set()
    for k, n in ((128, 64), (1024, 320), (4096, 4096), (4096, 28672), *HALVES[:-1]):
        if group_size == 128 and k % 128:
            continue
        one = layer(k, n, group_size)
        bias = torch.randn(n, device="cuda", dtype=dtype)
        for m in BATCHES:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            expected = reference(x, one, bias)
            for configuration, y in by_others(x, one, bias):
                met.add((configuration.kernel, configuration.tokens))
                assert error(y, expected) < tolerance(y), (k, n, m, configuration)
    assert met == {("mma", 8), ("mma", 16), *(("multistage", tokens) for tokens in TILES)}


@pytest.mark.parametrize(
    "k, n, group_size",
    [*((*shape, size) for shape in SHAPES for size in (128, -1)), *((*shape, -1) for shape in HALVES)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_edge_of_sparse_layers(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    from marlin_convert.kernels.matmul import matmul, reference

    one = sparse_layer(k, n, group_size)
    B, B_meta, s = (tensor.cuda() for tensor in marlin_24.pack(one).values())
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for m in BATCHES:
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        expected = reference(x, one, bias)
        y = matmul(x, B, s, bias, B_meta)
        assert error(y, expected) < tolerance(y), m
        assert torch.equal(y, matmul(x, B, s, bias, B_meta)), "not the same twice"
        for configuration, y in by_others(x, one, bias):
            assert error(y, expected) < tolerance(y), (m, configuration)


def test_the_largest_batch() -> None:
    from marlin_convert.kernels.matmul import matmul, reference

    one = layer(256, 320, 128)
    B, s = packed(one)
    x = torch.randn(65536 + 3, 256, device="cuda", dtype=torch.float16)
    assert error(matmul(x, B, s), reference(x, one)) < 3e-4


def test_shapes_strides_and_empty_batches() -> None:
    from marlin_convert.kernels.matmul import matmul, reference

    one = layer(512, 256, 128)
    B, s = packed(one)
    x = torch.randn(2, 3, 5, 512, device="cuda", dtype=torch.float16)
    assert matmul(x, B, s).shape == (2, 3, 5, 256)
    wide = torch.randn(20, 1024, device="cuda", dtype=torch.float16)
    for view in (
        wide[:, 100:612],
        wide[::2, :512],
        wide.view(40, 512).t().contiguous().t(),
        wide.flatten()[1:513],
    ):
        assert error(matmul(view, B, s), reference(view, one)) < 3e-4
    assert matmul(x[:0], B, s).shape == (0, 3, 5, 256)


def test_what_does_not_fit_is_refused() -> None:
    from marlin_convert.kernels.matmul import matmul

    B, s = packed(layer(512, 256, 128))
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16)
    for wrong in (
        (x[:, :256], B, s), (x.float(), B, s), (x, B.float(), s), (x, B, s.bfloat16()), (x, B[:-1], s),
        (x, B, s[:-1]), (x, B, s[:, :-64]), (x, B.cpu(), s), (x, B.t().contiguous().t(), s),
        (x, B, s, torch.zeros(255, device="cuda", dtype=torch.float16)),
        (x, B, s, torch.zeros(256, device="cuda", dtype=torch.bfloat16)),
    ):  # fmt: skip
        with pytest.raises(KernelError):
            matmul(*wrong)


@pytest.mark.usefixtures("tiles")
def test_poisoned_output_memory() -> None:
    """What the allocator hands out holds NaN: everything must be written."""
    from marlin_convert.kernels.matmul import matmul

    B, s = packed(layer(4096, 4096 + 64, 128))
    for m in (1, 17, 100, 300):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.float16)
        poison = torch.full((m, 4096 + 64), float("nan"), device="cuda", dtype=torch.float16)
        del poison
        assert matmul(x, B, s).isfinite().all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("m", [1, 12, 40, 200])
def test_poison_behind_the_inputs(m: int) -> None:
    """What is there of a last chunk beyond the inputs is never multiplied."""
    from marlin_convert.kernels.matmul import matmul, reference

    one = layer(576, 320, 64)
    B, s = packed(one)
    x = torch.full((m + 1, 576), float("nan"), device="cuda", dtype=torch.float16)[:m]
    x.copy_(torch.randn_like(x))
    expected = reference(x, one)
    assert error(matmul(x, B, s), expected) < 3e-4
    for configuration, y in by_others(x, one, None):
        assert error(y, expected) < 3e-4, configuration


@pytest.mark.usefixtures("tiles")
def test_two_streams_at_once() -> None:
    from marlin_convert.kernels.matmul import matmul

    B, s = packed(layer(4096, 4096, 128))
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.float16) for m in (1, 16, 64, 200)]
    expected = [matmul(x, B, s) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(matmul(x, B, s))
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_threads_at_once() -> None:
    """On one layer and one stream, whose prepared launches they share."""
    from marlin_convert.kernels.matmul import matmul

    B, s = packed(layer(512, 256, 128))
    xs = [torch.randn(1, 512, device="cuda", dtype=torch.float16) for _ in range(200)]
    expected = [matmul(x, B, s) for x in xs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                found = list(pool.map(lambda x: matmul(x, B, s), xs))
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("m", [1, 40])
def test_more_activations_than_maps_are_kept(m: int) -> None:
    from marlin_convert.kernels import launch
    from marlin_convert.kernels.matmul import matmul, reference

    one, other = layer(512, 256, 128), layer(512, 256, 128, seed=1)
    (B, s), (C, t) = packed(one), packed(other)
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
    expected = [matmul(x, B, s), matmul(x, C, t)]
    assert error(expected[0], reference(x, one)) < 3e-4 and error(expected[1], reference(x, other)) < 3e-4
    places = torch.empty(8 * (launch.KEPT + 100) + x.numel(), device="cuda", dtype=torch.float16)
    for start in range(0, len(places) - x.numel(), 8):
        matmul(places[start : start + x.numel()].zero_().view(m, 512), B, s)
    assert torch.equal(matmul(x, B, s), expected[0]) and torch.equal(matmul(x, C, t), expected[1])


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients(format: str, dtype: torch.dtype) -> None:
    """Of the input and of the bias, in eager mode and compiled."""
    from marlin_convert.kernels.matmul import LINEARS

    one = layer(1024, 768, 128) if format == "marlin" else sparse_layer(1024, 768, 128)
    bias = torch.randn(768, device="cuda", dtype=dtype, requires_grad=True)
    module = LINEARS[format](**FORMATS[format].pack(one)).cuda()
    module.bias = bias
    x = torch.randn(2, 5, 1024, device="cuda", dtype=dtype, requires_grad=True)
    weight = one.dequantize(torch.float64).cuda()
    given = torch.randn(2, 5, 768, device="cuda", dtype=dtype)
    for call in (module, torch.compile(module, fullgraph=True)):
        x.grad = bias.grad = None
        call(x).backward(given)
        assert error(x.grad, given.double() @ weight) < 2 * TOLERANCE[dtype]
        assert error(bias.grad, given.double().sum((0, 1))) < 2 * TOLERANCE[dtype]
    with torch.no_grad():
        assert not module(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_tangents(dtype: torch.dtype) -> None:
    """Both go past what a launch knows of: activations in float32, and one that carries a tangent."""
    from marlin_convert.kernels.matmul import MarlinLinear

    one = layer(1024, 768, 128)
    module = MarlinLinear(**marlin.pack(one)).cuda()
    x = torch.randn(5, 1024, device="cuda")
    expected = x.to(dtype).double() @ one.dequantize(torch.float64).cuda().t()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        for call in (module, torch.compile(module, fullgraph=True)):
            found = call(x)
            assert found.dtype == dtype and error(found, expected) < TOLERANCE[dtype]
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.zeros_like(x, dtype=dtype), x.to(dtype))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
        assert error(tangent, expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("m", [1, 12, 40, 200])
def test_the_largest_scales(m: int) -> None:
    from marlin_convert.kernels.matmul import LARGEST_SCALE, matmul, reference

    one = layer(512, 256, 128)
    one = replace(one, scales=one.scales.sign() * LARGEST_SCALE)
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16) * 1e-3
    y = matmul(x, *packed(one))
    assert y.isfinite().all() and error(y, reference(x, one)) < 3e-4


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
@pytest.mark.parametrize("current", [0, 1])
def test_a_layer_on_any_gpu_whichever_is_current(format: str, current: int) -> None:
    """Right, by the launch that was prepared first, on that GPU's own stream, and in a graph."""
    from marlin_convert.kernels import matmul as kernels

    one = layer(1024, 768, 128) if format == "marlin" else sparse_layer(1024, 768, 128)
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        module = kernels.LINEARS[format](**FORMATS[format].pack(one)).to(device)
        with torch.cuda.device(current):
            for m in (1, 12, 40, 200):
                x = torch.randn(m, 1024, device=device, dtype=torch.float16)
                y = module(x)
                assert y.device == device and error(y, kernels.reference(x, one)) < 3e-4
                calls = kernels._layers[id(module._buffers[module._suffixes[0]])].calls
                first = dict(calls)
                assert torch.equal(module(x), y) and calls == first, "prepared again"
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    z = module(x)
                torch.cuda.synchronize(device)
                assert torch.equal(z, y)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
                    z = module(x)
                with torch.cuda.device(device):
                    graph.replay()
                torch.cuda.synchronize(device)
                assert torch.equal(z, y)
            assert torch.cuda.current_device() == current


@two_gpus
def test_a_model_over_two_gpus_and_threads_on_each() -> None:
    from marlin_convert.kernels.matmul import MarlinLinear

    ones = [layer(512, 512, 128, seed) for seed in range(4)]
    layers = [MarlinLinear(*packed(one)).to(f"cuda:{number % 2}") for number, one in enumerate(ones)]

    def through(x: torch.Tensor) -> torch.Tensor:
        for number, one in enumerate(layers):
            x = one(x.to(f"cuda:{number % 2}"))
            x = x / x.norm()
        return x.cpu()

    xs = [torch.randn(1 + number % 3, 512, dtype=torch.float16) for number in range(60)]
    expected = [through(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(through, xs)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_graphs_and_compile(format: str) -> None:
    from marlin_convert.kernels.matmul import LINEARS, reference

    one = layer(1024, 768, 128) if format == "marlin" else sparse_layer(1024, 768, 128)
    module = LINEARS[format](**FORMATS[format].pack(one)).cuda()
    for m in (1, 40, 200):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.float16)
        expected = module(x)
        assert error(expected, reference(x, one)) < 3e-4
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(module(x)[:, :768].repeat(1, 2)[:, :1024])
            z = module(x)
        for _ in range(3):
            graph.replay()
        assert torch.equal(z, expected) and y.shape == (m, 768)
        compiled = torch.compile(module, fullgraph=True)
        assert torch.equal(compiled(x), expected)


@pytest.mark.skipif("VLLM_C" not in os.environ, reason="VLLM_C names vLLM's _C_stable_libtorch.abi3.so")
@pytest.mark.parametrize("group_size", [128, -1])
def test_vllm_multiplies_the_same_bytes(group_size: int) -> None:
    """Its own Marlin kernel takes B and s as they are on disk."""
    from marlin_convert.bench.multipliers import U4B8
    from marlin_convert.formats import words
    from marlin_convert.kernels.matmul import matmul, reference

    torch.ops.load_library(Path(os.environ["VLLM_C"]))
    theirs, k, n = torch.ops._C, 4096, 6144
    one = layer(k, n, group_size)
    B, s = packed(one)
    empty, locks = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (0, 4096))
    assert torch.equal(
        theirs.gptq_marlin_repack(words.pack_rows(one.codes, 4).cuda(), empty, k, n, 4, False), B
    )
    for m in (1, 16, 100, 1000):
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        none = [None] * 5
        y = theirs.marlin_gemm(x, None, B, None, s, *none, locks, U4B8, m, n, k, True, False, True, False)
        ours, expected = matmul(x, B, s), reference(x, one)
        assert error(y, expected) < 1e-3
        assert error(ours, y.double()) < 1e-3 and error(ours, expected) < 3e-4


PRODUCTS = """
from importlib import import_module
import torch
from marlin_convert.kernels.configurations import NARROW_TILES, Configuration, choose
from marlin_convert.kernels.launch import Call

module = import_module("marlin_convert.kernels.matmul")
matmul = module.matmul
OTHER, narrow = None, dict(NARROW_TILES)
module.choose = lambda *given: choose(*given[:5], OTHER or given[5], *given[6:])
def tensors(k, n, groups):
    s = torch.full((groups, n), 0.01, dtype=torch.half, device="cuda")
    B = torch.full((k // 16, 2 * n), 0x12345678, dtype=torch.int32, device="cuda")
    B_24 = torch.full((k // 32, 2 * n), 0x12345678, dtype=torch.int32, device="cuda")
    return s, B, B_24, torch.full((k // 32, 2 * n), 0x4444, dtype=torch.int16, device="cuda")

LAYERS = (1024, 768, 8), (512, 320, 4), (192, 320, 1), (576, 768, 1), (4608, 320, 36), (3072, 1088, 24)
for OTHER, tiles in ((None, narrow), (None, {}), ((8, 6), narrow)):
  NARROW_TILES.clear()
  NARROW_TILES.update(tiles)
  choose.cache_clear()
  for k, n, groups in LAYERS:
      s, B, B_24, B_meta = tensors(k, n, groups)
      for m in (1, 16, 17, 65, 200):
          x = torch.ones(m, k, dtype=torch.half, device="cuda")
          matmul(x, B, s)
          matmul(x, B_24, s, None, B_meta)
if torch.cuda.get_device_capability() == (9, 0):  # tiles that none chooses, by one, two and four blocks
  for columns, tokens in ((1, 64), (2, 64), (2, 96), (2, 128)):
    for k, n in ((128, 320), (1024, 5120), (3072, 2560), (1024, 320)):
      s, B, B_24, B_meta = tensors(k, n, 1)
      x = torch.ones(tokens - 1, k, dtype=torch.half, device="cuda")
      y = torch.empty(tokens - 1, n, dtype=torch.half, device="cuda")
      for sparse in (False, True):
          one = Configuration("narrow", tokens, 2, 0, False, sparse, columns=columns)
          Call(one, x, *((B_24, s, None, B_meta) if sparse else (B, s, None)))(x.data_ptr(), y.data_ptr())
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool: str) -> None:
    sanitizer.check(tool, PRODUCTS)
