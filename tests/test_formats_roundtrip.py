"""Random layers: every layout against its index formula, and there and back."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import two_of_four

from marlin_convert.formats import (
    FORMATS,
    Scheme,
    awq,
    compressed_tensors,
    gptq,
    marlin,
    marlin_24,
    words,
)
from marlin_convert.quantized import QuantizedLinear, contiguous_groups, same_codes


def layer(k, n, group_size, bits=4, asymmetric=False, act_order=False, seed=0, lowest_zero=0, sparse=False):
    g = torch.Generator().manual_seed(seed)
    top = 1 << bits
    groups = -(-k // group_size)
    scales = ((torch.rand(groups, n, generator=g) + 0.01) * 0.02).half()
    scales[0, 0] *= -1  # negative scales are legal
    zeros = order = None
    if asymmetric:
        zeros = torch.randint(lowest_zero, top, (groups, n), generator=g, dtype=torch.uint8)
    if act_order:
        order = contiguous_groups(k, group_size)[torch.randperm(k, generator=g)]
    codes = torch.randint(0, top, (k, n), generator=g, dtype=torch.uint8)
    if sparse:
        codes[~two_of_four(k, n, g)] = 8
    return QuantizedLinear.normalized(codes, scales, group_size, bits, zeros, order)


def assert_same(a, b):
    assert (a.bits, a.group_size) == (b.bits, b.group_size)
    assert same_codes(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    assert (a.zeros is None) == (b.zeros is None)
    assert a.zeros is None or torch.equal(a.zeros, b.zeros)
    assert (a.group_of_row is None) == (b.group_of_row is None)
    assert a.group_of_row is None or torch.equal(a.group_of_row, b.group_of_row)


def field(word, f, bits):
    return (word >> (bits * f)) & ((1 << bits) - 1)


def slow_stream(words_2d, bits, k):
    """Codes [k][n] of words along the first axis, one field at a time."""
    per_word = 32 // bits
    return [[field(word, r % per_word, bits) for word in words_2d[r // per_word]] for r in range(k)]


def slow_marlin(packed, k, n):
    """Codes [k][n] of B by the index formula."""
    codes = [[None] * n for _ in range(k)]
    for kt in range(k // 16):
        for c in range(2 * n):
            block, i, j = c // 128, c % 128 // 4, c % 4
            for f in range(8):
                row = 16 * kt + 2 * (i % 4) + (f >> 2) + 8 * (f & 1)
                column = 64 * block + 16 * j + i // 4 + 8 * ((f >> 1) & 1)
                assert codes[row][column] is None
                codes[row][column] = field(packed[kt][c], f, 4)
    return codes


@pytest.mark.parametrize(
    "k, n, group_size",
    [
        (128, 64, 128),
        (256, 64, 128),
        (128, 192, 32),
        (384, 128, 384),
        (64, 64, 64),
        (64, 64, 32),
        (192, 64, 64),
        (576, 64, 576),
    ],
)
def test_marlin_is_its_index_formula(k, n, group_size):
    q = layer(k, n, group_size, seed=k + n)
    packed = marlin.pack(q)
    assert slow_marlin(packed["B"].tolist(), k, n) == q.codes.tolist()
    for o in range(n):
        if q.groups == 1:
            source = 32 * (o // 32) + 2 * (o % 32 // 8) + 8 * (o % 8 // 2) + o % 2
        else:
            source = 64 * (o // 64) + o % 64 // 8 + 8 * (o % 8)
        assert torch.equal(packed["s"][:, o], q.scales[:, source])


def slow_marlin_24(packed, meta, k, n):
    """Codes [k][n] and what was kept of B_24 and B_meta by the index formulas."""
    left = [[None] * n for _ in range(k // 2)]
    for t in range(k // 32):
        for c in range(2 * n):
            block, i, j = c // 128, c % 128 // 4, c % 4
            for f in range(8):
                row = 16 * t + 2 * (i % 4) + (f >> 2) + 8 * (f & 1)
                column = 64 * block + 8 * (i // 4) + 4 * ((f >> 1) & 1) + j
                assert left[row][column] is None
                left[row][column] = field(packed[t][c], f, 4)
    codes, kept = ([[zero] * n for _ in range(k)] for zero in (8, False))
    for column in range(n):
        for c in range(k // 16):
            row = 64 * (column // 64) + 32 * (column % 4 // 2) + 4 * (column % 64 // 8)
            row += 2 * (column % 2) + column % 8 // 4
            r, d = (row ^ 1, c ^ 1) if row % 2 != c % 2 else (row, c)
            for t in range(4):
                quad = 4 * c + t
                pair = field(meta[d // 2][2 * r + d % 2], t, 4)
                for place, code in zip((pair % 4, pair // 4), left[2 * quad : 2 * quad + 2], strict=True):
                    codes[4 * quad + place][column] = code[column]
                    kept[4 * quad + place][column] = True
    return codes, kept


@pytest.mark.parametrize(
    "k, n, group_size", [(128, 64, 128), (256, 64, 128), (384, 128, 384), (64, 64, 64), (576, 64, 576)]
)
def test_marlin_24_is_its_index_formula(k, n, group_size):
    q = layer(k, n, group_size, seed=k + n, sparse=True)
    packed = marlin_24.pack(q)
    codes, kept = slow_marlin_24(packed["B_24"].tolist(), packed["B_meta"].tolist(), k, n)
    read = marlin_24.unpack(packed, Scheme("marlin-24", 4, group_size))
    assert codes == q.codes.tolist() and kept == read.kept.tolist()
    for o in range(n):
        source = o if q.groups == 1 else 8 * (o // 8) + o % 8 // 2 + 4 * (o % 2)
        assert torch.equal(packed["s"][:, o], q.scales[:, source])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_its_bit_stream(bits, version):
    q = layer(96, 64, 32, bits, asymmetric=True, lowest_zero=1, seed=bits)
    packed = gptq.pack(q, version=version)
    assert slow_stream(packed["qweight"].tolist(), bits, 96) == q.codes.tolist()
    stored = torch.tensor(slow_stream(packed["qzeros"].t().tolist(), bits, 64)).t()
    assert torch.equal(stored + (version == 1), q.zeros.to(torch.int64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, n", [(32, 8), (30, 5), (7, 3)])
def test_compressed_tensors_is_its_bit_stream(bits, k, n):
    q = layer(k, n, k, bits, asymmetric=True, seed=k * n)
    packed = compressed_tensors.pack(q)
    assert slow_stream(packed["weight_packed"].t().tolist(), bits, k) == q.codes.tolist()
    assert slow_stream(packed["weight_zero_point"].tolist(), bits, n) == q.zeros.t().tolist()
    assert packed["weight_shape"].tolist() == [n, k]
    assert_same(compressed_tensors.unpack(packed, Scheme("compressed-tensors", bits, -1, False)), q)


def test_awq_is_its_nibble_order():
    g = torch.Generator().manual_seed(5)
    k, n = 64, 24
    qweight = torch.randint(-(2**31), 2**31, (k, n // 8), generator=g).to(torch.int32)
    qzeros = torch.randint(-(2**31), 2**31, (2, n // 8), generator=g).to(torch.int32)
    read = awq.unpack(
        {"qweight": qweight, "qzeros": qzeros, "scales": torch.ones(2, n).half()},
        Scheme("awq", 4, 32, symmetric=False),
    )
    for packed, codes in ((qweight, read.codes), (qzeros, read.zeros)):
        for row in range(len(packed)):
            for w in range(n // 8):
                for f, lane in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    assert codes[row, 8 * w + lane].item() == field(packed[row, w].item(), f, 4)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 10),
    n=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128, None]),
    seed=st.integers(0, 2**31),
)
def test_marlin_there_and_back(k, n, group_size, seed):
    if group_size == 128:
        k += k % 2
    q = layer(64 * k, 64 * n, group_size or 64 * k, seed=seed)
    scheme = Scheme("marlin", 4, group_size or -1)
    assert_same(marlin.unpack(marlin.pack(q), scheme), q)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 10),
    n=st.integers(1, 5),
    group_size=st.sampled_from([128, None]),
    masked=st.booleans(),
    in_memory=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_marlin_24_there_and_back(k, n, group_size, masked, in_memory, seed):
    k, n = 64 * (k + k % 2 if group_size else k), 64 * n
    q = layer(k, n, group_size or k, seed=seed)
    kept = two_of_four(k, n, torch.Generator().manual_seed(seed))
    q.codes[~kept] = 8
    q = replace(q, kept=kept if masked else None)
    memory = torch.empty(2 * q.k * q.n, dtype=torch.uint8) if in_memory else None
    read = marlin_24.unpack(marlin_24.pack(q), Scheme("marlin-24", 4, group_size or -1), memory)
    assert_same(read, q)
    assert not masked or torch.equal(read.kept, kept)
    assert not ((read.codes != 8) & ~read.kept).any() and (read.kept.view(-1, 4, n).sum(1) == 2).all()
    packed = marlin_24.pack(read)
    assert all(torch.equal(packed[suffix], found) for suffix, found in marlin_24.pack(q).items())


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    asymmetric=st.booleans(),
    act_order=st.booleans(),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_gptq_there_and_back(k, n, bits, group_size, asymmetric, act_order, version, seed):
    group_size = min(group_size, 32 * k)
    q = layer(32 * k, 32 * n, group_size, bits, asymmetric, act_order, seed, lowest_zero=2 - version)
    scheme = Scheme("gptq", bits, group_size, not asymmetric, version)
    assert_same(gptq.unpack(gptq.pack(q, version=version), scheme), q)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 6),
    n=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group_size=st.integers(1, 70),
    asymmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_compressed_tensors_there_and_back(groups, n, bits, group_size, asymmetric, seed):
    q = layer(groups * group_size, n, group_size, bits, asymmetric, seed=seed)
    scheme = Scheme("compressed-tensors", bits, group_size, symmetric=q.zeros is None)
    assert_same(compressed_tensors.unpack(compressed_tensors.pack(q), scheme), q)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 70), n=st.integers(1, 40), bits=st.sampled_from([4, 8]), slab=st.integers(1, 400))
def test_words_do_not_depend_on_the_slab(k, n, bits, slab):
    codes = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8)
    whole = words.pack_rows(codes, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "SLAB", slab)
        assert torch.equal(words.pack_rows(codes, bits), whole)
        assert torch.equal(words.unpack_rows(whole, bits, k), codes)
    assert torch.equal(words.unpack_columns(words.pack_columns(codes, bits), bits, n), codes)


@pytest.mark.parametrize("slab", [1, 1000, 1 << 19])
def test_marlin_does_not_depend_on_the_slab(monkeypatch, slab):
    q = layer(640, 192, 128, seed=3)
    whole = marlin.pack(q)["B"]
    monkeypatch.setattr(words, "SLAB", slab)
    assert torch.equal(marlin.pack(q)["B"], whole)
    assert torch.equal(marlin.unpack(marlin.pack(q), Scheme("marlin", 4, 128)).codes, q.codes)


@pytest.mark.parametrize("slab", [1, 1000, 1 << 19])
def test_marlin_24_does_not_depend_on_the_slab(monkeypatch, slab):
    q = layer(640, 192, 128, seed=3, sparse=True)
    whole = marlin_24.pack(q)
    monkeypatch.setattr(words, "SLAB", slab)
    packed = marlin_24.pack(q)
    assert all(torch.equal(packed[suffix], whole[suffix]) for suffix in whole)
    assert torch.equal(marlin_24.unpack(packed, Scheme("marlin-24", 4, 128)).codes, q.codes)


@given(order=st.permutations(["marlin", "marlin-24", "gptq", "compressed-tensors"]), seed=st.integers(0, 99))
@settings(max_examples=24, deadline=None)
def test_all_layouts_exchange_what_is_sparse(order, seed):
    q = layer(384, 192, 128, seed=seed, sparse=True)
    read = q
    for name in order:
        read = FORMATS[name].unpack(FORMATS[name].pack(read), Scheme(name, 4, 128))
        assert_same(read, q)
        assert (read.kept is not None) == (name == "marlin-24")


def test_a_chain_through_all_layouts_is_exact():
    q = layer(512, 320, 64, seed=9)
    a = gptq.unpack(gptq.pack(q), Scheme("gptq", 4, 64))
    b = marlin.unpack(marlin.pack(a), Scheme("marlin", 4, 64))
    c = compressed_tensors.unpack(compressed_tensors.pack(b), Scheme("compressed-tensors", 4, 64))
    assert_same(c, q)
    v2, ct = gptq.pack(q, version=2), compressed_tensors.pack(q)
    assert torch.equal(v2["qweight"].t(), ct["weight_packed"])
    assert torch.equal(v2["scales"].t(), ct["weight_scale"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["marlin", "marlin-24", "gptq", "compressed-tensors"])
def test_a_gpu_writes_and_reads_the_same(name):
    q = layer(384, 256, 128, seed=2, sparse=True)
    here = FORMATS[name].pack(q)
    there = FORMATS[name].pack(QuantizedLinear(q.codes.cuda(), q.scales.cuda(), 128))
    assert all(found.is_cuda and torch.equal(found.cpu(), here[suffix]) for suffix, found in there.items())
    read = FORMATS[name].unpack(there, Scheme(name, 4, 128))
    assert read.codes.is_cuda and torch.equal(read.codes.cpu(), q.codes)
    assert torch.equal(read.dequantize().cpu(), q.dequantize())


@pytest.mark.parametrize("layout", [marlin, marlin_24])
def test_parts_of_64_columns_pack_alone(layout):
    q = layer(256, 192, 128, seed=4, sparse=True)
    whole = layout.pack(q)
    parts = [
        layout.pack(QuantizedLinear(q.codes[:, cut], q.scales[:, cut], 128))
        for cut in (slice(0, 64), slice(64, 192))
    ]
    for suffix in layout.SUFFIXES:
        assert torch.equal(torch.cat([part[suffix] for part in parts], 1), whole[suffix])


@pytest.mark.parametrize("layout", [marlin, marlin_24])
def test_parts_of_whole_groups_pack_alone(layout):
    """But for the scales of a part with one group, which are in another order than beside others."""
    size = 64 if layout is marlin else 128
    q = layer(4 * size, 64, size, seed=5, sparse=True)
    *codes, s = layout.SUFFIXES
    whole = layout.pack(q)
    for groups in (slice(1, 3), slice(3, 4), slice(0, 3)):
        rows = slice(size * groups.start, size * groups.stop)
        part = layout.pack(QuantizedLinear(q.codes[rows], q.scales[groups], size))
        for suffix in codes:
            step = q.k // len(whole[suffix])
            assert torch.equal(part[suffix], whole[suffix][rows.start // step : rows.stop // step])
        scales = whole[s][groups]
        assert torch.equal(part[s], layout.only_group(scales) if len(scales) == 1 else scales)


def test_pack_takes_views_and_leaves_them_alone():
    q = layer(256, 128, 128, seed=6, sparse=True)
    strided = q.codes.t().contiguous().t()
    offset = torch.cat((torch.zeros(3, dtype=torch.uint8), q.codes.flatten()))[3:].view(256, 128)
    for codes in (strided, offset):
        view = QuantizedLinear(codes, q.scales, 128)
        for name in ("marlin", "marlin-24", "gptq", "compressed-tensors"):
            written, expected = FORMATS[name].pack(view), FORMATS[name].pack(q)
            assert all(torch.equal(written[suffix], expected[suffix]) for suffix in expected)
        assert torch.equal(codes, q.codes)


@pytest.mark.parametrize("name", ["marlin", "marlin-24", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("k, n, group_size", [(256, 128, 128), (128, 64, 128), (256, 64, -1)])
def test_tensors_says_what_pack_writes(name, k, n, group_size):
    q = layer(k, n, k if group_size == -1 else group_size, sparse=True)
    planned = FORMATS[name].tensors(k, n, bits=4, group_size=group_size)
    packed = FORMATS[name].pack(q)
    assert planned == {suffix: (found.dtype, tuple(found.shape)) for suffix, found in packed.items()}
    assert set(planned) <= set(FORMATS[name].SUFFIXES)
    assert all(found.is_contiguous() for found in packed.values())
    assert FORMATS[name].refusal(k, n, bits=4, group_size=group_size) is None


@pytest.mark.parametrize(
    "bits, asymmetric, act_order", [(4, False, False), (4, True, True), (8, True, False)]
)
def test_dequantize(bits, asymmetric, act_order):
    q = layer(70, 9, 32, bits, asymmetric, act_order, seed=1)
    weight = q.dequantize()
    assert weight.shape == (9, 70) and weight.dtype == torch.float32
    for row, column in (random.Random(0).sample(range(70), 2) for _ in range(20)):
        column %= 9
        group = row // 32 if q.group_of_row is None else int(q.group_of_row[row])
        zero = 1 << (bits - 1) if q.zeros is None else int(q.zeros[group, column])
        expected = torch.tensor(float(int(q.codes[row, column]) - zero)) * q.scales[group, column].float()
        assert weight[column, row] == expected
    assert torch.equal(q.dequantize(torch.float16), weight.half())


def test_quantized_linear_refuses_what_does_not_fit():
    q = layer(64, 32, 32)
    for wrong in (
        lambda: QuantizedLinear(q.codes.int(), q.scales, 32),
        lambda: QuantizedLinear(q.codes, q.scales, 64),
        lambda: QuantizedLinear(q.codes, q.scales, 0),
        lambda: QuantizedLinear(q.codes, q.scales, 32, bits=3),
        lambda: QuantizedLinear(q.codes, q.scales, 32, zeros=q.scales),
        lambda: QuantizedLinear(q.codes, q.scales, 32, group_of_row=contiguous_groups(63, 32)),
        lambda: QuantizedLinear(q.codes, q.scales, 32, kept=q.codes),
        lambda: QuantizedLinear(q.codes, q.scales, 32, kept=torch.ones(32, 32, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_same_codes():
    a = torch.arange(64, dtype=torch.uint8).view(8, 8)
    b = a.clone()
    assert same_codes(a, b) and same_codes(a.t(), b.t()) and same_codes(a[:, 1:], b[:, 1:])
    b[7, 7] = 0
    assert not same_codes(a, b) and not same_codes(a, a.view(4, 16))
