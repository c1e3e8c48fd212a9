"""The kernels without a GPU: they compile for every architecture, and the module multiplies on a CPU."""

import copy
import ctypes
import gc
import io
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import plain_reading
import pytest
import torch
from torch.autograd import forward_ad

from marlin_convert.errors import KernelError
from marlin_convert.formats import Scheme, marlin, marlin_24
from marlin_convert.kernels import compile as compiling
from marlin_convert.kernels import launch
from marlin_convert.kernels.configurations import (
    NARROW_TILES,
    SHARED_MEMORY,
    TILES,
    Beside,
    Configuration,
    choose,
    choose_for_experts,
    schedule,
)
from marlin_convert.kernels.matmul import Marlin24Linear, MarlinLinear, matmul, reference
from marlin_convert.quantized import QuantizedLinear

GROUPS = (0, 32, 64, 128)
SPARSE_GROUPS = (0, 128)
# bytes a thread may spill: next to none on Hopper, some around the loops of mma.sync's large tiles
SPILLS = {"stream": 0, "wgmma": 32, "narrow": 0, "mma": 900, "multistage": 32}


def configurations(capability: tuple[int, int]) -> list[Configuration]:
    """Everything that can be chosen for an architecture."""
    found: dict[Configuration, None] = {}
    for sparse in (False, True):
        for group in SPARSE_GROUPS if sparse else GROUPS:
            for bfloat16 in (False, True):
                few = (choose(m, 57344, 8192, group, bfloat16, capability, sparse) for m in (1, 9))
                many = choose(64, 57344, 8192, group, bfloat16, capability, sparse)
                tiles = (replace(many, tokens=tokens) for tokens in TILES)
                found |= dict.fromkeys([*few, *(one for one in tiles if one.fits)])
                if capability == (9, 0):
                    found |= {
                        Configuration("narrow", tokens, 2, group, bfloat16, sparse, columns=columns): None
                        for columns, tiles in NARROW_TILES.items()
                        for tokens in tiles
                    }
    return list(found)


def for_experts(capability: tuple[int, int]) -> list[Configuration]:
    """Everything that can be chosen for experts."""
    found = {
        one: None
        for each in (*range(1, 150), 256, 4096)
        for group in GROUPS
        for bfloat16 in (False, True)
        for fused in (False, True)
        for one in choose_for_experts(each * 8, 8, (group, group), bfloat16, capability, fused)
    }
    return list(found)


def disassembled(cubin: bytes) -> str:
    """Its SASS."""
    import nvidia

    places = [Path(place) / "cu13" / "bin" for place in nvidia.__path__]
    disassembler = shutil.which("nvdisasm", path=":".join(map(str, places)))
    assert disassembler
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([disassembler, "-c", file.name], text=True)


# What the first operand of is not written; uniform registers are none of these.
NOT_WRITING = ("ST", "RED", "BAR", "SYNCS", "R2UR", "R2P", "BRA", "WARP", "U")


def overwritten(sass: str) -> list[str]:
    """Instructions that write a register of metadata while the tensor cores still read it, on any way there.

    A product is done at the wait that leaves fewer groups than have begun since its own.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+((?:@\S+ )?\s*[A-Z].*?) *;", line):
            operation = re.sub(r"^@\S+\s+", "", found[1])
            code.append((operation, found[1]))
    early = []
    for number, (product, _) in enumerate(code):
        if not product.startswith("HGMMA.SP"):
            continue
        metadata = int(re.findall(r"R(\d+)", product)[-1])
        seen: set[tuple[int, int]] = set()
        ways = [(number + 1, 0 if "gsb0" in product else -1)]
        while ways:
            place, later = ways.pop()
            if (place, later) in seen:
                continue
            seen.add((place, later))
            operation, whole = code[place]
            later += operation.startswith("HGMMA") and "gsb0" in operation
            if wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", operation):
                if later >= int(wait[1]):
                    continue
            elif not operation.startswith(NOT_WRITING):
                first = re.match(r"\S+ (?:!?U?P[T\d]+, )*R(\d+)\b", operation)
                name = operation.split()[0]
                width = 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)", name) else 1
                if first and int(first[1]) <= metadata < int(first[1]) + width and "HGMMA" not in name:
                    early.append(f"{operation}, after {product}")
            if operation.startswith("BRA"):
                ways.append((labels[re.search(r"\.L_x_\d+", operation)[0]], later))  # type: ignore[index]
            if not (whole.startswith(("BRA `", "EXIT"))):
                ways.append((place + 1, later))
    return early


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kernel", ["route", "combine"])
def test_what_is_beside_them_compiles(kernel: str, bfloat16: bool) -> None:
    for arch in ("sm_80", "sm_90a", "sm_120"):
        assert len(compiling.compile(compiling.source(Beside(kernel, bfloat16)), arch)[0]) > 1000


@pytest.mark.parametrize("capability", compiling.ARCHITECTURES, ids=lambda c: compiling.ARCHITECTURES[c])
def test_every_configuration_compiles(capability: tuple[int, int]) -> None:
    arch = compiling.architecture(capability)

    def compiled(configuration: Configuration) -> tuple[bytes, str]:
        return compiling.compile(compiling.source(configuration), arch)

    found = configurations(capability)
    if capability not in ((8, 0), (9, 0)):  # the same sources as the first of these: a few of each kind
        tiles = (8, 32, 128) if sum(capability) % 2 else (16, 48, 96)
        found = [one for one in found if one.group == (128, 0)[one.bfloat16] and one.tokens in tiles]
    else:
        # of every tile one in three; a GPU compiles what it runs
        found = [one for one in found if not (one.tokens // 16 + one.group // 32 + one.bfloat16) % 3]
        found = [one for one in found if one.kernel != "narrow" or one.tokens in (8, 64, 128)]
        # of those for experts, which are many, each kernel in one of the groups
        found += [one for one in for_experts(capability) if one.group == (128, 0)[one.bfloat16]]
    with ThreadPoolExecutor(2) as pool:  # half the time on two processors
        programs = list(pool.map(compiled, found))
    for configuration, (code, said) in zip(found, programs, strict=True):
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", said)]
        assert registers and max(registers) * configuration.threads <= 65536
        if configuration.group in (0, 128):
            assert max(spilled) <= SPILLS[configuration.kernel], configuration
        beside = max(int(count) for count in [*re.findall(r"(\d+) bytes smem", said), "16"])
        assert configuration.shared_memory + beside <= SHARED_MEMORY[capability] * 1024
        assert configuration.fits
        assert len(code) > 1000
        if configuration.kernel in ("wgmma", "narrow") and configuration.sparse:
            sass = disassembled(code)
            pieces = configuration.features * configuration.rows // (64 * 128)
            assert sass.count("HGMMA.SP") == 2 * pieces, "half of them a warpgroup, each in four steps"
            assert not overwritten(sass)


@pytest.mark.parametrize(
    "k, n, m, tile",
    [
        (4096, 4096, 1, ("narrow", 8, 1)),  # each with the tile that was fastest, or within 1 % of it
        (4096, 6144, 1, ("narrow", 8, 1)),
        (4096, 28672, 16, ("stream", 16, 4)),
        (8192, 8192, 16, ("narrow", 16, 1)),
        (28672, 8192, 48, ("narrow", 48, 2)),
        (14336, 4096, 64, ("narrow", 64, 1)),
        (4096, 6144, 64, ("narrow", 64, 1)),
        (4096, 4096, 128, ("narrow", 64, 1)),
        (4096, 28672, 192, ("wgmma", 96, 4)),
        (28672, 8192, 128, ("narrow", 128, 2)),
        (4096, 6144, 256, ("narrow", 128, 2)),
        (8192, 10240, 128, ("wgmma", 128, 4)),
        (8192, 57344, 256, ("wgmma", 128, 4)),
        (2048, 1024, 8, ("narrow", 8, 1)),
        (4096, 4096, 8, ("narrow", 8, 1)),
        (2048, 2048, 4096, ("wgmma", 128, 4)),
    ],
)
def test_the_tile_with_the_least_cost(k: int, n: int, m: int, tile: tuple[str, int, int]) -> None:
    chosen = choose(m, n, k, 128, False, (9, 0))
    assert (chosen.kernel, chosen.tokens, chosen.columns) == tile


def test_a_gpu_with_fewer_processors_gets_larger_tiles() -> None:
    few, many = (choose(64, 4096, 4096, 128, False, (8, 6), processors=count).tokens for count in (28, 142))
    assert (few, many) == (64, 32)
    # and only where two chunks find room
    assert choose(4096, 4096, 4096, 32, False, (8, 0)).tokens == 128
    assert choose(4096, 4096, 4096, 32, False, (8, 6)).tokens == 96


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("m, expected", [(1, "HMMA"), (32, "HGMMA"), (64, "HGMMA"), (4096, "HGMMA")])
def test_hopper_uses_its_tensor_cores(m: int, expected: str, sparse: bool) -> None:
    configuration = choose(m, 57344, 8192, 128, False, (9, 0), sparse)
    code = disassembled(compiling.compile(compiling.source(configuration), "sm_90a")[0])
    assert expected in code and "UTMALDG" in code
    assert (f"{expected}.SP" in code) == sparse


@pytest.mark.parametrize("kernel, columns", [("wgmma", 4), ("narrow", 2)])
def test_metadata_that_goes_too_early_is_seen(kernel: str, columns: int) -> None:
    """The kernel as it was when the last step's was loaded with the others."""
    early = source = compiling.source(Configuration(kernel, 64, 2, 128, False, sparse=True, columns=columns))
    early = early.replace("if (SPARSE && r < STEPS - 1) which", "if (SPARSE) which")
    early = early.replace("if (SPARSE && r == 0)", "if (false)")
    assert early.count("if (false)") == 1 and early != source
    assert overwritten(disassembled(compiling.compile(early, "sm_90a")[0]))


def test_the_cache_keeps_whole_entries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "cache"))
    configuration = choose(1, 4096, 4096, 128, False, (8, 0))
    code = compiling.cubin.__wrapped__(configuration, "sm_80")
    (entry,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(compiling, "compile", lambda *_: pytest.fail("compiled again"))
    assert compiling.cubin.__wrapped__(configuration, "sm_80") == code
    monkeypatch.undo()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "cache"))
    content = bytearray(entry.read_bytes())
    content[100] ^= 1
    for damaged in (bytes(content), b"", content[:50]):
        entry.write_bytes(damaged)
        assert compiling.cubin.__wrapped__(configuration, "sm_80") == code
        assert entry.read_bytes()[32:] == code
    # another architecture is another entry; a cache that cannot be written is none
    compiling.cubin.__wrapped__(configuration, "sm_86")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "file" / "cache"))
    assert compiling.cubin.__wrapped__(configuration, "sm_80") == code


def test_an_unknown_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"compute capability 7\.5"):
        compiling.architecture((7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelError, match=r"compute capability 7\.5"):
        launch.capability(0)  # asked before a tile is chosen
    assert compiling.ARCHITECTURES.keys() == SHARED_MEMORY.keys()


MANY = Configuration("wgmma", 64, 2, 128, False)
FEW = Configuration("stream", 8, 3, 128, False)
NARROW = Configuration("narrow", 16, 2, 128, False, columns=1)


def test_blocks_of_the_grid() -> None:
    for tiles, blocks in (
        (224, 132),
        (48, 132),
        (1, 132),
        (112, 112),
        (40, 120),
        (32, 128),
        (132, 132),
        (256, 128),
    ):
        assert schedule(FEW, tiles, 32, 132)[0] == blocks
    assert schedule(MANY, 4, 32, 132) == (32, 0, 32, 8, 4, 0), "no more than a cluster"
    assert schedule(MANY, 48, 32, 132)[0] == 132
    assert schedule(replace(MANY, sparse=True), 48, 32, 132) == (96, 0, 32, 2, 16, 0)


@pytest.mark.parametrize("processors", [1, 16, 78, 132])
@pytest.mark.parametrize("sparse", [False, True])
def test_no_more_narrow_tiles_than_processors(processors: int, sparse: bool) -> None:
    narrow = 0
    for m in (1, 8, 16, 33, 64, 129, 400):
        for n in (64, 320, 64 * processors, 64 * processors + 64, 8192, 57344):
            one = choose(m, n, 1024, 128, False, (9, 0), sparse, processors)
            blocks = schedule(one, one.tiles(m, n), one.chunks(1024), processors)[0]
            assert blocks <= processors and one.fits
            narrow += one.kernel == "narrow"
            assert one.kernel != "narrow" or one.tiles(m, n) <= processors
    assert narrow


@pytest.mark.parametrize(
    "tiles, chunks, blocks, share",
    [
        *((132, 8, 132, 1), (67, 8, 67, 1), (66, 8, 132, 2), (66, 1, 66, 1), (38, 8, 114, 3)),
        *((39, 8, 78, 2), (29, 8, 116, 4), (1, 8, 4, 4), (1, 3, 3, 3)),
    ],
)
def test_blocks_of_narrow_tiles(tiles: int, chunks: int, blocks: int, share: int) -> None:
    """Clusters of two find room everywhere, those of three and four only if some processors are left."""
    plan = schedule(NARROW, tiles, chunks, 132)
    assert (plan[0], plan[3]) == (blocks, share)
    assert plan[1] * chunks + plan[4] >= 1, "a cluster without chunks for all"


@pytest.mark.parametrize(
    "configuration, plan, at_once, expected",
    [
        (MANY, (0, 32, 8, 4, 0), 15, 8),
        (MANY, (0, 32, 8, 4, 0), 3, 1),  # four are wanted
        (FEW, (0, 32, 8, 4, 0), 15, 1),
        (MANY, (0, 32, 16, 2, 0), 15, 1),
        (MANY, (0, 32, 1, 32, 0), 15, 1),
        (MANY, (1, 32, 8, 4, 0), 15, 1),  # another tile before
        (MANY, (0, 16, 8, 2, 0), 15, 1),  # runs that are not a tile
        (MANY, (0, 32, 8, 0, 4), 15, 1),  # some blocks without chunks
        (NARROW, (0, 32, 4, 8, 0), 3, 4),  # there is no other way to sum up
        (NARROW, (1, 0, 1, 0, 0), 3, 1),
    ],
)
def test_blocks_of_a_cluster(configuration, plan, at_once, expected, monkeypatch):
    monkeypatch.setattr(launch, "_clusters", lambda loaded, size: at_once)
    loaded = launch.Loaded(c_void_p(), configuration, 132, True)
    assert launch._cluster(loaded, 32, 32, plan) == expected


@pytest.mark.parametrize(
    "configuration, tiles",
    [
        (one, tiles)
        for one in (FEW, MANY, NARROW)
        for tiles in (1, 3, 40, 112, 131, 132, 133, 264, 300, 1792)
        if one != NARROW or tiles <= 132
    ],
    ids=lambda one: getattr(one, "kernel", str(one)),
)
@pytest.mark.parametrize("chunks", [1, 32, 224])
def test_every_chunk_belongs_to_one_block(configuration: Configuration, tiles: int, chunks: int) -> None:
    """What csrc/tiles.cuh reads from the schedule, in Python."""
    blocks, whole, run, share, each, more = schedule(configuration, tiles, chunks, 132)
    done = [tile * chunks + k for tile in range(whole * blocks) for k in range(chunks)]

    def first(block: int) -> int:
        part = block % share
        return block // share * run + part * each + min(part, more)

    for block in range(blocks):
        done += range(whole * blocks * chunks + first(block), whole * blocks * chunks + first(block + 1))
    assert done == list(range(tiles * chunks))


def test_a_last_chunk_may_have_half_of_the_rows() -> None:
    assert [MANY.chunks(k) for k in (64, 128, 192, 576, 10944)] == [1, 1, 2, 5, 86]
    assert [NARROW.chunks(k) for k in (64, 512, 576, 10944)] == [1, 1, 2, 22]


def test_chunks_are_as_high_as_three_of_them_have_room() -> None:
    for group, sparse in itertools.product((0, 32, 64, 128), (False, True)):
        every = {
            (columns, tokens): Configuration("narrow", tokens, 2, group, False, sparse, columns=columns)
            for columns, tiles in NARROW_TILES.items()
            for tokens in tiles
        }
        assert all(one.stages >= 3 for one in every.values())
        halved = {tile for tile, one in every.items() if one.rows * one.columns != 512}
        assert halved == {(1, 64), (2, 128)}
        assert every[1, 64].rows == 256 and every[2, 128].rows == 128


@pytest.mark.parametrize("k", [64, 128, 192, 576])
def test_what_the_copy_engine_brings_fills_a_stage(k: int, driver: "Driver") -> None:
    """Whole boxes, however small the matrix: a block waits for bytes that never come, and never ends."""
    for configuration in configurations((9, 0)):
        sparse, group = configuration.sparse, configuration.group
        if k % (group or 64):
            continue
        step = 32 if sparse else 16
        B, s = torch.empty(k // step, 512, dtype=torch.int32), torch.empty(k // (group or k), 256).half()
        x, B_meta = torch.empty(1, k).half(), torch.empty(k // 32, 512, dtype=torch.int16) if sparse else None
        driver.boxes.clear()
        launch.Call(configuration, x, B, s, None, B_meta)(x.data_ptr(), 0)
        assert driver.boxes[B.data_ptr()] == configuration.rows * configuration.features // (step // 8)
        brought = sum(size for tensor, size in driver.boxes.items() if group or tensor != s.data_ptr())
        brought += driver.boxes[x.data_ptr()] * (configuration.rows // 64 - 1)  # boxes of 64 inputs
        assert -(-brought // 1024) * 1024 == configuration._stage
        launch._tensor_maps.clear()


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_module_runs_on_a_cpu(group_size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (256, 128), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(256 // group_size, 128, generator=draw) * 0.02 + 0.001).half()
    layer = QuantizedLinear(codes=codes, scales=scales, group_size=group_size)
    tensors = marlin.pack(layer)
    bias = torch.randn(128, generator=draw).to(dtype)
    module = MarlinLinear(tensors["B"], tensors["s"], bias)
    x = torch.randn(2, 5, 256, generator=draw).to(dtype)
    expected = reference(x, layer, bias)
    assert ((module(x).double() - expected).norm() / expected.norm()) < 1e-2
    assert set(module.state_dict()) == {"B", "s", "bias"}


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("k", [64, 192, 576, 704, 960, 1856])
def test_inputs_that_64_divides(k: int, group_size: int) -> None:
    """Module and reference, by what another reading of the bytes says the weights are."""
    module = random_linear(k, k, 128, 1 if group_size == -1 else k // group_size)
    read = plain_reading.weight(module.state_dict(), "", Scheme("marlin", 4, group_size))
    x, weight = torch.randn(3, k, dtype=torch.float64), torch.from_numpy(read)
    layer = marlin.unpack(module.state_dict(), Scheme("marlin", 4, group_size))
    torch.testing.assert_close(reference(x, layer), x @ weight.double().t())
    expected = torch.nn.functional.linear(x, weight.double(), module.bias.double())
    assert (module(x.float()) - expected).norm() < 1e-5 * expected.norm()


def random_linear(seed: int, k: int = 128, n: int = 64, groups: int = 1) -> MarlinLinear:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), generator=draw, dtype=torch.uint8)
    scales = torch.rand(groups, n, generator=draw).half()
    return MarlinLinear(
        **marlin.pack(QuantizedLinear(codes, scales, k // groups)), bias=torch.randn(n, generator=draw)
    )


def test_the_module_dequantizes_once_until_its_tensors_change() -> None:
    module, other, x = random_linear(0), random_linear(1), torch.randn(3, 128)
    with torch.inference_mode():
        expected = module(x)
    weight = module._weight
    gradient = module(x.requires_grad_())
    gradient.sum().backward()
    assert torch.equal(gradient, expected) and module._weight is weight and x.grad is not None
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x)) and not torch.equal(module(x), expected)
    assert module.half()(x.half()).dtype == torch.float16
    assert module.to("meta")._weight is None


def halve(s: torch.Tensor) -> None:
    s.mul_(0.5)


def halve_data(s: torch.Tensor) -> None:
    s.data.mul_(0.5)


def turn_around(s: torch.Tensor) -> None:
    s.copy_(s.flip(1).clone())  # of the same sum


def turn_data_around(s: torch.Tensor) -> None:
    s.data.copy_(s.flip(1).clone())


@pytest.mark.parametrize("change", [halve, halve_data, turn_around, turn_data_around])
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_is_not_answered_from_before(change, inference: bool) -> None:
    with torch.inference_mode(inference):
        module, x = random_linear(0), torch.randn(3, 128)
        module.bias = None
        before = module(x)
        change(module.s)
        fresh = MarlinLinear(module.B.clone(), module.s.clone())
        assert torch.equal(module(x), fresh(x)) and not torch.equal(module(x), before)


def test_codes_that_change_places_are_not_answered_from_before() -> None:
    """Written through numpy, rows and columns: no version counts it, and no plain sum tells it."""
    module, x = random_linear(0, 256, 128, 2), torch.randn(3, 256)
    before, words = module(x), module.B.numpy()
    for turned in (words[::-1], words[:, ::-1]):
        words[:] = turned.copy()
        fresh = MarlinLinear(module.B.clone(), module.s.clone(), module.bias)
        assert torch.equal(module(x), fresh(x)) and not torch.equal(module(x), before)


def moved(module: MarlinLinear, name: str) -> MarlinLinear:
    words = {
        "to bfloat16": lambda: module.to(torch.bfloat16),
        "bfloat16": module.bfloat16,
        "half": module.half,
        "double": module.double,
        "device and dtype": lambda: module.to("cpu", torch.bfloat16),
        "type": lambda: module.type(torch.bfloat16),
        "in a model": lambda: torch.nn.Sequential(module).to(torch.bfloat16)[0],
    }
    return words[name]()


@pytest.mark.parametrize(
    "name", ["to bfloat16", "bfloat16", "half", "double", "device and dtype", "type", "in a model"]
)
def test_casting_leaves_what_is_packed(name: str) -> None:
    module, x = random_linear(0, 256, 64, 2), torch.randn(3, 256, dtype=torch.float64)
    module.bias.data.copy_(module.bias.bfloat16())
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    expected = module.double()(x)
    cast = moved(module, name)
    for key in ("B", "s"):
        assert cast.state_dict()[key].dtype == before[key].dtype
        assert torch.equal(cast.state_dict()[key], before[key])
    assert cast.bias is not None and cast.bias.dtype not in (torch.float32,)
    assert torch.equal(cast.double()(x), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_that_was_cast_is_refused(dtype: torch.dtype, assign: bool) -> None:
    """Copied, codes that went through bfloat16 would be other codes, and nothing would say so."""
    model, x = torch.nn.Sequential(random_linear(0)), torch.randn(3, 128)
    expected = model(x)
    state = {key: tensor.to(dtype) for key, tensor in random_linear(1).state_dict(prefix="0.").items()}
    with pytest.raises(RuntimeError, match=rf"0.B is {dtype}, torch.int32 is meant"):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model(x), expected)


def test_a_copy_of_a_module_that_has_run_holds_its_tensors_alone() -> None:
    module, x = random_linear(0, 1024, 256), torch.randn(3, 1024)
    expected = module(x)
    state = sum(tensor.nbytes for tensor in module.state_dict().values())
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < state + 10_000
    file.seek(0)
    for copied in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert copied._weight is None and torch.equal(copied(x), expected)


def test_what_is_derived_goes_with_the_codes() -> None:
    module, x = random_linear(0), torch.randn(3, 128)
    module(x)
    weight = weakref.ref(module._weight)
    module.B = module.B.to("meta")  # as accelerate does when it offloads a layer
    gc.collect()
    assert weight() is None


def test_gradients_are_those_of_the_dequantized_weight() -> None:
    module = random_linear(0, 256, 64, 2)
    assert module.bias is not None
    bias = module.bias.requires_grad_()
    x = torch.randn(2, 3, 256, requires_grad=True)
    (module(x) * torch.arange(64)).sum().backward()
    found = x.grad, bias.grad
    x.grad = bias.grad = None
    weight = torch.ops.marlin_convert.weight(module.B, module.s, None, torch.float32)
    (torch.nn.functional.linear(x, weight, bias) * torch.arange(64)).sum().backward()
    for ours, theirs in zip(found, (x.grad, bias.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tangents_are_those_of_the_dequantized_weight() -> None:
    module, x, tangent = random_linear(0, 256, 64, 2), torch.randn(3, 256), torch.randn(3, 256)
    weight = torch.ops.marlin_convert.weight(module.B, module.s, None, torch.float32)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
        of_bias = torch.randn(64)
        module.bias = forward_ad.make_dual(module.bias.detach(), of_bias)
        found_bias = forward_ad.unpack_dual(module(x)).tangent
    torch.testing.assert_close(found, tangent @ weight.t())
    assert torch.equal(found_bias, of_bias.expand(3, 64))
    with pytest.raises(NotImplementedError):  # torch.func has no way to it; it never gives a zero
        torch.func.jvp(module, (x,), (tangent,))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast_casts_as_it_does_for_a_linear(backend: str | None) -> None:
    module, x = random_linear(0, 256, 64, 2), torch.randn(3, 256)
    dense = torch.nn.Linear(256, 64)
    weight = torch.ops.marlin_convert.weight(module.B, module.s, None, torch.float32)
    dense.load_state_dict({"weight": weight, "bias": module.bias.float()})
    module.float()
    run = torch.compile(module, backend=backend, fullgraph=True) if backend else module
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16(), x.half()):
            found = run(given)
            assert found.dtype == torch.bfloat16 and torch.equal(found, dense(given))
        assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("sparse", [False, True])
def test_the_operators_keep_to_torch_s_rules(sparse: bool) -> None:
    """Schema, fake tensors, gradients and compilation, as torch's own check tries them."""
    if sparse:
        B, B_meta, s = marlin_24.pack(sparse_layer(128, 64, 128)).values()
    else:
        module = random_linear(0)
        B, s, B_meta = module.B, module.s, None
    x, bias = torch.randn(3, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    torch.library.opcheck(torch.ops.marlin_convert.matmul.default, (x, B, s, bias, B_meta))
    torch.library.opcheck(torch.ops.marlin_convert.weight.default, (B, s, B_meta, torch.float32))


def test_the_module_compiles_in_one_graph_before_it_has_run() -> None:
    module, x = random_linear(0), torch.randn(3, 128)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def test_the_module_says_its_shape() -> None:
    module = random_linear(0, 256, 64, 2)
    assert (module.in_features, module.out_features) == (256, 64)
    assert "in_features=256, out_features=64" in repr(module)


@pytest.mark.parametrize("scale", [8192.0, -8192.0, torch.inf, torch.nan])
def test_a_scale_that_leaves_float16_is_refused(scale: float) -> None:
    module = random_linear(0)
    state = module.state_dict()
    state["s"] = state["s"].clone()
    state["s"][0, 5] = scale
    for make in (lambda: MarlinLinear(state["B"], state["s"]), lambda: module.load_state_dict(state)):
        with pytest.raises(KernelError, match="up to 8188"):
            make()
    MarlinLinear(state["B"], torch.full_like(state["s"], -8188))


class Driver:
    """Stands in for CUDA's driver: a tensor map is the address of its matrix, a launch what it points at."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int]] = []
        self.matrix: list[int] = []
        self.activations: list[int] = []
        self.boxes: dict[int, int] = {}  # bytes of one, by the address of the matrix

    def cuTensorMapEncodeTiled(self, place, kind, dimensions, address, sizes, strides, box, *rest) -> int:
        self.boxes[address.value] = box[0] * box[1] * launch.BYTES[kind]
        ctypes.memmove(place.value, address.value.to_bytes(8, "little") * 16, 128)
        return 0

    def cuLaunchKernelEx(self, launch, handle, pointers, extra) -> int:
        word = ctypes.c_uint64.from_address
        self.launches.append((word(pointers[0] + 8).value, word(pointers[0] + 32).value))
        if len(pointers) > 1:
            self.matrix.append(word(pointers[1]).value)
            self.activations.append(word(pointers[4]).value)
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: found)
    monkeypatch.setattr(launch, "load", lambda one, device: launch.Loaded(c_void_p(1), one, 132, False))
    monkeypatch.setattr(launch, "workspace", lambda *_: (torch.empty(1), torch.empty(1)))
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(launch, "_tensor_maps", {})
    return found


def prepared(configuration: Configuration) -> tuple[launch.Call, torch.Tensor]:
    """A launch for one token of a layer, and the layer's codes."""
    B, s = torch.empty(16, 512, dtype=torch.int32), torch.empty(2, 256, dtype=torch.half)
    return launch.Call(configuration, torch.empty(1, 256, dtype=torch.half), B, s, None), B


def test_a_launch_keeps_the_maps_of_its_weights(driver: Driver) -> None:
    """A server meets more activations than maps are kept, and other layers take the memory of freed ones."""
    call, B = prepared(FEW)
    others = [prepared(FEW)]
    for number in range(1, launch.KEPT + 200):
        call(4096 * number, 0)
        others[0] = prepared(FEW)
    gc.collect()
    call(4096, 0)
    assert set(driver.matrix) == {B.data_ptr()}
    assert len(launch._tensor_maps) <= launch.KEPT


@pytest.mark.parametrize("configuration", [FEW, Configuration("mma", 8, 2, 128, False)], ids=["maps", "mma"])
def test_threads_that_launch_at_once_launch_what_they_asked_for(driver: Driver, configuration) -> None:
    call, _ = prepared(configuration)
    count, starts = 20_000, (1 << 30, 1 << 40)

    def work(start: int) -> None:
        for number in range(count):
            call(start + number % 5000, start + number % 5000)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, starts))
    finally:
        sys.setswitchinterval(before)
    asked = Counter((start + i % 5000,) * 2 for start in starts for i in range(count))
    assert Counter(driver.launches) == asked
    assert driver.activations == [x for x, _ in driver.launches if configuration.on_hopper]


def test_without_the_interpreter_s_lock_nothing_is_launched(monkeypatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(KernelError, match="without its global lock"):
        launch._driver.__wrapped__()


def test_shapes_that_do_not_fit_are_refused() -> None:
    B, s = torch.zeros(16, 256, dtype=torch.int32), torch.zeros(2, 128, dtype=torch.float16)
    MarlinLinear(B, s)
    for wrong in (
        (B.float(), s),
        (B, s.float()),
        (B[:6], s),  # 96 inputs
        (B[:12], s),  # 192 in two groups
        (B, s[:, :64]),
        (B, s[:0]),
        (B[:, :250], s),
    ):
        with pytest.raises(KernelError):
            MarlinLinear(*wrong)


def sparse_layer(k: int, n: int, group_size: int, seed: int = 0) -> QuantizedLinear:
    """Random codes, of which two random ones of every quad are kept."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(k // 4, 4, n, generator=draw).argsort(1).argsort(1).view(k, n) < 2
    codes = torch.randint(0, 16, (k, n), generator=draw, dtype=torch.uint8).where(kept, 8)
    scales = (torch.rand(k // group_size, n, generator=draw) * 0.02 + 0.001).half()
    return QuantizedLinear(codes=codes, scales=scales, group_size=group_size, kept=kept)


def test_sparse_bytes_as_the_tensor_cores_read_them() -> None:
    """What csrc takes from B_24 and B_meta, for m16n8k32 and m64nNk32 as the PTX manual describes them."""
    k, n = 256, 128
    layer = sparse_layer(k, n, 128)
    tensors = marlin_24.pack(layer)
    words = tensors["B_24"].view(k // 32, n // 64, 32, 4).tolist()
    metadata = tensors["B_meta"].view(torch.int32).view(k // 32, n // 64, 2, 32).tolist()
    dense = torch.zeros(k, n, dtype=torch.int)
    for step, columns, fragment, lane in itertools.product(
        range(k // 32), range(n // 64), range(4), range(32)
    ):
        row, pair = divmod(lane, 4)
        word = words[step][columns][lane][fragment]
        for half, register in itertools.product(range(2), range(2)):  # features 8 rows on, codes 8 on
            feature = 64 * columns + 8 * row + 4 * half + fragment
            for e in range(2):
                code = word >> (8 * half + 4 * register + 16 * e) & 15
                held = 8 * register + 2 * pair + e  # which of the 16 that are held
                place = held // 8 + 2 * (fragment % 2)  # of the four lanes, the one with its metadata
                bits = metadata[step][columns][fragment // 2][4 * row + place] >> (16 * half)
                index = bits >> (4 * (held % 8 // 2) + 2 * (held % 2)) & 3
                dense[32 * step + 4 * (held // 2) + index, feature] = code - 8
    assert torch.equal(dense, layer.codes.int() - 8)


@pytest.mark.parametrize("group_size", [128, 256])
def test_the_sparse_module_runs_on_a_cpu(group_size: int) -> None:
    layer = sparse_layer(256, 128, group_size)
    tensors = marlin_24.pack(layer)
    module = Marlin24Linear(tensors["B_24"], tensors["B_meta"], tensors["s"])
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).half()
    expected = reference(x, layer)
    assert ((module(x).double() - expected).norm() / expected.norm()) < 2e-3
    assert set(module.state_dict()) == {"B_24", "B_meta", "s"}
    with pytest.raises(KernelError, match="int16"):
        Marlin24Linear(tensors["B_24"], tensors["B_meta"].int(), tensors["s"])
    with pytest.raises(KernelError, match="groups are of 128 rows"):
        Marlin24Linear(tensors["B_24"], tensors["B_meta"], torch.ones(4, 128).half())


def test_the_operator_has_a_shape_without_a_gpu() -> None:
    B = torch.empty(16, 256, dtype=torch.int32, device="meta")
    s = torch.empty(2, 128, dtype=torch.float16, device="meta")
    x = torch.empty(3, 4, 256, dtype=torch.float16, device="meta")
    assert matmul(x, B, s).shape == (3, 4, 128)


@pytest.mark.parametrize("name", ["B", "s", "bias", "x"])
def test_a_tensor_that_was_never_loaded_is_no_answer(name: str) -> None:
    """A fake of a product has the shape of one, and memory that nobody has written."""
    module, x = random_linear(0), torch.randn(3, 128)
    if name == "x":
        x, name = x.to("meta"), "B"
    else:
        setattr(module, name, getattr(module, name).to("meta"))
    with pytest.raises(KernelError, match=rf"{name} is on (meta|cpu), x on (cpu|meta)"):
        module(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_that_no_linear_takes_are_refused(device: str) -> None:
    module = random_linear(0).to(device)
    with pytest.raises(KernelError, match=r"x is \(3, 128\) torch.int64; floating point with 128 inputs"):
        module(torch.ones(3, 128, dtype=torch.int64, device=device))
    with pytest.raises(KernelError, match=r"x is \(3, 64\) torch.float32; floating point with 128 inputs"):
        module(torch.ones(3, 64, device=device))
