"""Bytes written by the peers' own packers, read and written again."""

from pathlib import Path

import plain_reading
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from marlin_convert.formats import Scheme, awq, compressed_tensors, gptq, marlin, marlin_24
from marlin_convert.quantized import QuantizedLinear

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    group_size = int(metadata["group_size"])
    return load_file(path), int(metadata["bits"]), group_size


def names(prefix):
    found = sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.safetensors"))
    assert found
    return found


def test_every_golden_file_is_used():
    used = [
        name for prefix in ("gptq", "marlin_", "marlin24", "ct_pack", "awq_gemm") for name in names(prefix)
    ]
    assert sorted(used) == sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", names("gptq"))
def test_gptq(name, version):
    golden, bits, group_size = load(name)
    zeros, order = golden["zeros"], golden["g_idx"]
    layer = QuantizedLinear.normalized(golden["q"], golden["in_scales"], group_size, bits, zeros, order)
    assert (layer.group_of_row is not None) == name.endswith("_act")
    assert (layer.zeros is not None) == name.endswith("_asym")
    packed = gptq.pack(layer, version=version)
    stored = {
        "qweight": golden["qweight"],
        "qzeros": golden[f"qzeros_v{version}"],
        "scales": golden["scales"],
        "g_idx": golden["g_idx"],
    }
    assert packed.keys() == stored.keys()
    for suffix, expected in stored.items():
        assert packed[suffix].dtype == expected.dtype
        assert torch.equal(packed[suffix], expected), suffix
    read = gptq.unpack(stored, Scheme("gptq", bits, group_size, layer.zeros is None, version))
    assert_same(read, layer)


@pytest.mark.parametrize("name", names("marlin_"))
def test_marlin(name):
    golden, bits, group_size = load(name)
    k = golden["q"].shape[0]
    layer = QuantizedLinear(golden["q"], golden["scales"], k if group_size == -1 else group_size, bits)
    packed = marlin.pack(layer)
    assert torch.equal(packed["B"], golden["B"])
    assert torch.equal(packed["s"], golden["s"])
    assert_same(marlin.unpack(golden, Scheme("marlin", bits, group_size)), layer)


@pytest.mark.parametrize("name", names("marlin24"))
def test_marlin_24(name):
    golden, bits, group_size = load(name)
    k = golden["q24"].shape[0]
    layer = QuantizedLinear(golden["q24"], golden["scales"], k if group_size == -1 else group_size, bits)
    scheme = Scheme("marlin-24", bits, group_size)
    read = marlin_24.unpack(golden, scheme)
    assert_same(read, layer)
    assert read.kept.view(-1, 4, layer.n).sum(1).unique().tolist() == [2]
    # what was kept follows from the codes, and what is read is written as it was
    for source in (layer, read):
        packed = marlin_24.pack(source)
        assert list(packed) == ["B_24", "B_meta", "s"]
        for suffix, written in packed.items():
            assert written.dtype == golden[suffix].dtype
            assert torch.equal(written, golden[suffix]), suffix
    expected = plain_reading.weight({f"a.{suffix}": golden[suffix] for suffix in packed}, "a", scheme)
    assert torch.equal(read.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("name", names("ct_pack"))
def test_compressed_tensors(name):
    golden, bits, group_size = load(name)
    middle = 1 << (bits - 1)
    codes = (golden["qi"].to(torch.int16) + middle).to(torch.uint8).t()
    zeros = (golden["in_zp"].to(torch.int16) + middle).to(torch.uint8).t().contiguous()
    layer = QuantizedLinear.normalized(codes, golden["in_scale"].t(), group_size, bits, zeros)
    packed = compressed_tensors.pack(layer)
    for suffix, written in packed.items():
        assert written.dtype == golden[suffix].dtype
        assert torch.equal(written, golden[suffix]), suffix
    assert ("weight_zero_point" in packed) == ("weight_zero_point" in golden)
    read = compressed_tensors.unpack(
        golden, Scheme("compressed-tensors", bits, group_size, layer.zeros is None)
    )
    assert_same(read, layer)


@pytest.mark.parametrize("name", names("awq_gemm"))
def test_awq(name):
    golden, bits, group_size = load(name)
    read = awq.unpack(golden, Scheme("awq", bits, group_size, symmetric=False))
    assert_same(read, QuantizedLinear(golden["q"], golden["in_scales"], group_size, bits, golden["zeros"]))


def test_worked_words():
    assert load("marlin_K256_N256_g128")[0]["B"][0, 0].item() & 0xFFFFFFFF == 0x7E90DF95
    golden = load("gptq_b4_K256_N256_g128_sym")[0]
    assert golden["q"][:8, 0].tolist() == [9, 11, 1, 5, 2, 8, 4, 8]
    assert golden["qweight"][0, 0].item() & 0xFFFFFFFF == 0x848251B9


def assert_same(read, layer):
    assert (read.bits, read.group_size) == (layer.bits, layer.group_size)
    assert torch.equal(read.codes, layer.codes)
    assert torch.equal(read.scales, layer.scales)
    for mine, theirs in ((read.zeros, layer.zeros), (read.group_of_row, layer.group_of_row)):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
