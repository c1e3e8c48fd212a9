"""What peers get wrong, or files say wrong: read right or refused with the numbers, never just changed."""

import pytest
import torch

from marlin_convert.errors import FormatError
from marlin_convert.formats import (
    FORMATS,
    Scheme,
    awq,
    bounds,
    compressed_tensors,
    gptq,
    marlin,
    marlin_24,
    words,
)
from marlin_convert.quantized import QuantizedLinear, contiguous_groups

WRITTEN = ["marlin", "marlin-24", "gptq", "compressed-tensors"]


def layer(k=128, n=64, group_size=128, bits=4, dtype=torch.float16, **fields):
    g = torch.Generator().manual_seed(k + n + group_size)
    codes = torch.randint(0, 1 << bits, (k, n), generator=g, dtype=torch.uint8)
    codes.view(-1, 4, n)[:, 2:] = 1 << (bits - 1)  # 2:4, so that every format holds it
    scales = torch.full((-(-k // group_size), n), 0.125, dtype=dtype)
    return QuantizedLinear(codes, scales, group_size, bits, **fields)


def zeros(value, groups=1, n=64):
    return torch.full((groups, n), value, dtype=torch.uint8)


def test_v1_refuses_zero_point_0_and_v2_holds_it():
    z = zeros(5)
    z[0, 2] = 0
    q = layer(zeros=z)
    with pytest.raises(FormatError, match=r"1 of 64 zero points are 0.*\[0, 2\]"):
        gptq.pack(q)
    packed = gptq.pack(q, version=2)
    assert packed["qzeros"][0, 0].item() == 0x55555055
    assert torch.equal(gptq.unpack(packed, Scheme("gptq", 4, 128, False, 2)).zeros, z)


def test_between_v1_and_v2_no_field_touches_its_neighbour():
    # stored 4 is zero 5 in version 1; the field of 15 next to it must not carry, so it is refused
    fields = zeros(4)
    fields[0, 3] = 15
    q = gptq.pack(layer(zeros=zeros(5)))
    q["qzeros"] = words.pack_columns(fields, 4)
    with pytest.raises(FormatError, match=r"1 of 64 zero points are stored.*\[0, 3\] is 15"):
        gptq.unpack(q, Scheme("gptq", 4, 128, symmetric=False))
    read = gptq.unpack(q, Scheme("gptq", 4, 128, symmetric=False, version=2))
    assert read.zeros[0, :5].tolist() == [4, 4, 4, 15, 4]
    # 15 in truth is stored 14 in version 1, 15 in version 2, neighbours as they were
    q = layer(zeros=fields)
    assert gptq.pack(q)["qzeros"][0, 0].item() == 0x3333E333
    assert gptq.pack(q, version=2)["qzeros"][0, 0].item() & 0xFFFFFFFF == 0x4444F444


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("claimed", [1, 2])
@pytest.mark.parametrize("true", [1, 2])
def test_symmetric_zeros_under_the_wrong_version(bits, claimed, true):
    q = layer(bits=bits)
    read = gptq.unpack(gptq.pack(q, version=true), Scheme("gptq", bits, 128, True, claimed))
    assert read.zeros is None and torch.equal(read.codes, q.codes)


@pytest.mark.parametrize("version", [1, 2])
def test_zeros_of_a_model_that_claims_to_be_symmetric_are_kept(version):
    z = zeros(8)
    z[0, 7] = 9
    packed = gptq.pack(layer(zeros=z), version=version)
    read = gptq.unpack(packed, Scheme("gptq", 4, 128, True, version))
    assert torch.equal(read.zeros, z)
    with pytest.raises(FormatError, match="no zero points"):
        marlin.pack(read)


def test_a_layer_with_all_zeros_7_in_an_asymmetric_v1_model_is_not_taken_for_v2():
    packed = gptq.pack(layer(zeros=zeros(9)))  # stored 8
    assert int(gptq.unpack(packed, Scheme("gptq", 4, 128, False)).zeros[0, 0]) == 9


@pytest.mark.parametrize("name", ["marlin", "marlin-24"])
@pytest.mark.parametrize("scale", [8192.0, -8192.0])
def test_scales_that_their_kernels_cannot_multiply_are_refused(name, scale):
    q = layer()
    q.scales[0, 3] = 8188
    FORMATS[name].pack(q)
    q.scales[0, 3] = scale
    with pytest.raises(FormatError, match=r"1 of 64 scales are beyond 8188.*\[0, 3\]"):
        FORMATS[name].pack(q)
    gptq.pack(q)


@pytest.mark.parametrize("name", WRITTEN)
def test_codes_beyond_the_bits_are_refused(name):
    q = layer()
    q.codes[77, 3] = 28
    q.codes[90, 1] = 255
    with pytest.raises(FormatError, match=r"2 of 8192 codes do not fit 4 bits; the first at \[77, 3\] is 28"):
        FORMATS[name].pack(q)


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_zero_codes_beyond_the_bits_are_refused(name):
    with pytest.raises(FormatError, match="64 of 64 zero points do not fit 4 bits"):
        FORMATS[name].pack(layer(zeros=zeros(16)))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(
    "value, why",
    [(0.0, "are zero"), (-0.0, "are zero"), (float("nan"), "not finite"), (float("-inf"), "not finite")],
)
def test_scales_that_are_no_scales_are_refused(name, value, why):
    q = layer(k=256)
    q.scales[1, 5] = value
    with pytest.raises(FormatError, match=rf"1 of 128 scales are {why.removeprefix('are ')}.*\[1, 5\]"):
        FORMATS[name].pack(q)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "value, exact", [(2.0**17, False), (2.0**-30, False), (-0.375, True), (2.0**-24, True)]
)
def test_wider_scales_are_written_exactly_or_refused(name, dtype, value, exact):
    q = layer(dtype=dtype)
    q.scales[0, 9] = value
    if exact:
        written = FORMATS[name].pack(q)
        scale = next(t for t in written.values() if t.is_floating_point())
        assert scale.dtype == torch.float16 and (scale.float() == value).sum() == 1
    else:
        with pytest.raises(FormatError, match=r"1 of 64 scales cannot be represented exactly.*\[0, 9\]"):
            FORMATS[name].pack(q)


def test_float32_scales_with_more_digits_than_float16_are_refused():
    q = layer(dtype=torch.float32)
    q.scales[0, 0] = 0.1
    with pytest.raises(FormatError, match="cannot be represented exactly"):
        marlin.pack(q)


@pytest.mark.parametrize("name", WRITTEN)
def test_negative_scales_are_legal(name):
    q = layer()
    q.scales[:] *= -1
    written = FORMATS[name].pack(q)
    read = FORMATS[name].unpack(written, Scheme(name, 4, 128))
    assert torch.equal(read.scales, q.scales)


def test_awq_zero_points_of_0_are_0():
    packed = torch.full((1, 8), 0x55055555, dtype=torch.int32)  # nibble 5: column 3
    read = awq.unpack(
        {
            "qweight": torch.zeros(128, 8, dtype=torch.int32),
            "qzeros": packed,
            "scales": torch.ones(1, 64).half(),
        },
        Scheme("awq", 4, 128, symmetric=False),
    )
    assert read.zeros[0, :8].tolist() == [5, 5, 5, 0, 5, 5, 5, 5]
    assert torch.equal(
        gptq.unpack(gptq.pack(read, version=2), Scheme("gptq", 4, 128, False, 2)).zeros, read.zeros
    )
    with pytest.raises(FormatError, match="are 0"):
        gptq.pack(read)


@pytest.mark.parametrize("config_group_size", [128, -1])
def test_the_number_of_groups_picks_the_scale_layout(config_group_size):
    q = layer(k=128, group_size=128)
    q.scales[0] = torch.arange(1, 65)
    packed = marlin.pack(q)
    assert packed["s"][0, :8].tolist() == [1, 2, 9, 10, 17, 18, 25, 26]
    assert torch.equal(marlin.unpack(packed, Scheme("marlin", 4, config_group_size)).scales, q.scales)


def test_g_idx_decides_and_not_desc_act():
    q = layer(k=256, group_size=64)
    packed = gptq.pack(q)
    # the flag says activation order, g_idx does not
    assert gptq.unpack(packed, Scheme("gptq", 4, 64, act_order=True)).group_of_row is None
    # the flag says nothing, g_idx does
    packed["g_idx"] = contiguous_groups(256, 64).flip(0).contiguous()
    read = gptq.unpack(packed, Scheme("gptq", 4, 64, act_order=False))
    assert torch.equal(read.group_of_row, packed["g_idx"])
    assert torch.equal(gptq.pack(read)["g_idx"], packed["g_idx"])
    for name in ("marlin", "compressed-tensors"):
        with pytest.raises(FormatError, match="activation order"):
            FORMATS[name].pack(read)


def test_negative_g_idx_counts_from_the_end():
    q = layer(k=256, group_size=64)
    packed = gptq.pack(q)
    packed["g_idx"] = packed["g_idx"] - 4
    assert gptq.unpack(packed, Scheme("gptq", 4, 64)).group_of_row is None
    packed["g_idx"][0] = 3
    assert int(gptq.unpack(packed, Scheme("gptq", 4, 64)).group_of_row[0]) == 3
    for outside in (-5, 4):
        packed["g_idx"][0] = outside
        with pytest.raises(FormatError, match=f"{outside}.*4 groups"):
            gptq.unpack(packed, Scheme("gptq", 4, 64))


def test_a_g_idx_of_zeros_says_nothing():
    q = layer(k=256, group_size=64)
    q.scales[:] = torch.tensor([1, 2, 3, 4]).half()[:, None]
    packed = gptq.pack(q)
    packed["g_idx"].zero_()
    read = gptq.unpack(packed, Scheme("gptq", 4, 64))
    assert read.group_of_row is None
    assert torch.equal(read.dequantize(), q.dequantize())


def test_without_g_idx():
    packed = gptq.pack(layer(k=256, group_size=64))
    del packed["g_idx"]
    assert gptq.unpack(packed, Scheme("gptq", 4, 64)).group_of_row is None
    with pytest.raises(FormatError, match="unknown"):
        gptq.unpack(packed, Scheme("gptq", 4, 64, act_order=True))


def test_compressed_tensors_legacy_g_idx():
    scheme = Scheme("compressed-tensors", 4, 64, act_order=True)
    packed = compressed_tensors.pack(layer(k=256, group_size=64))
    with pytest.raises(FormatError, match="unknown"):
        compressed_tensors.unpack(packed, scheme)
    packed["weight_g_idx"] = torch.full((256,), -1, dtype=torch.int32)
    assert compressed_tensors.unpack(packed, scheme).group_of_row is None
    packed["weight_g_idx"] = contiguous_groups(256, 64).flip(0).contiguous()
    assert compressed_tensors.unpack(packed, scheme).group_of_row.tolist()[:65] == [3] * 64 + [2]
    packed["weight_g_idx"][0] = -1
    with pytest.raises(FormatError, match="-1"):
        compressed_tensors.unpack(packed, scheme)


def test_gptqmodels_marlin_is_a_kernel_not_a_layout():
    with pytest.raises(FormatError, match="GPTQ's") as refused:
        marlin.unpack(gptq.pack(layer()), Scheme("marlin", 4, 128))
    assert "checkpoint_format" in refused.value.hint


def test_marlin_under_autoawqs_names():
    q = layer(k=256)
    packed = marlin.pack(q)
    renamed = {"qweight": packed["B"], "scales": packed["s"]}
    read = marlin.unpack(renamed, Scheme("marlin", 4, 128, names=("qweight", "scales")))
    assert torch.equal(read.codes, q.codes) and torch.equal(read.scales, q.scales)


@pytest.mark.parametrize(
    "k, n, options, numbers",
    [
        (128, 96, {}, "outputs divisible by 64, has 96"),
        (1500, 64, {}, "inputs divisible by 64, has 1500"),
        (96, 64, {"group_size": 32}, "inputs divisible by 64, has 96"),
        (576, 64, {}, "inputs divisible by the group size 128, has 576"),
        (64, 64, {}, "inputs divisible by the group size 128, has 64"),
        (128, 64, {"bits": 8}, "holds 4 bits, not 8"),
        (256, 64, {"group_size": 16}, "has 16"),
        (128, 64, {"symmetric": False}, "not symmetric"),
        (128, 64, {"act_order": True}, "activation order"),
    ],
)
def test_marlin_refusals_say_the_numbers(k, n, options, numbers):
    assert numbers in marlin.refusal(k, n, **{"bits": 4, "group_size": 128, **options})


@pytest.mark.parametrize(
    "k, n, options, numbers",
    [
        (128, 32, {}, "outputs divisible by 64, has 32"),  # the metadata would fall onto itself
        (128, 96, {}, "outputs divisible by 64, has 96"),
        (48, 64, {"group_size": -1}, "inputs divisible by 64, has 48"),
        (96, 64, {"group_size": -1}, "inputs divisible by 64, has 96"),
        (576, 64, {}, "inputs divisible by the group size 128, has 576"),
        (128, 64, {"bits": 8}, "holds 4 bits, not 8"),
        (256, 64, {"group_size": 64}, "groups of 128 rows or one for all 256, has 64"),
        (128, 64, {"symmetric": False}, "not symmetric"),
        (128, 64, {"act_order": True}, "activation order"),
    ],
)
def test_marlin_24_refusals_say_the_numbers(k, n, options, numbers):
    assert numbers in marlin_24.refusal(k, n, **{"bits": 4, "group_size": 128, **options})


def test_other_refusals_say_the_numbers():
    assert "divisible by 32, has 33" in gptq.refusal(33, 32, bits=4, group_size=-1)
    assert "divisible by 32, has 40" in gptq.refusal(32, 40, bits=4, group_size=-1)
    assert "not 3" in gptq.refusal(32, 32, bits=3, group_size=-1)
    assert "not 3" in compressed_tensors.refusal(32, 32, bits=3, group_size=-1)
    assert "group size 128, has 192" in compressed_tensors.refusal(192, 32, bits=4, group_size=128)
    with pytest.raises(FormatError, match="divisible by 32, has 40"):
        gptq.pack(layer(n=40))


def corrupted(name):
    """A packed layer of the format, each time with one thing wrong with it."""
    q = layer(k=256, n=64, zeros=zeros(5, 2) if "marlin" not in name else None)
    packed = FORMATS[name].pack(q) if name != "awq" else None
    if packed is None:
        packed = {
            "qweight": torch.zeros(256, 8, dtype=torch.int32),
            "qzeros": torch.zeros(2, 8, dtype=torch.int32),
            "scales": torch.ones(2, 64).half(),
        }
    for suffix, found in packed.items():
        if suffix not in ("g_idx", "weight_g_idx"):
            yield {other: packed[other] for other in packed if other != suffix}
        for wrong in (
            found[:-1],
            found[:0],
            found.to(torch.float64),
            found.unsqueeze(0),
            found.view(-1)[:-3],
        ):
            yield {**packed, suffix: wrong.contiguous()}


@pytest.mark.parametrize("name", [*WRITTEN, "awq"])
def test_tensors_that_do_not_fit_together_are_refused(name):
    for tensors in corrupted(name):
        with pytest.raises(FormatError):
            FORMATS[name].unpack(tensors, Scheme(name, 4, 128, symmetric=False))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_config_of_another_group_size_is_refused(name):
    packed = FORMATS[name].pack(layer(k=256, group_size=128))
    for wrong in (64, -1, 256):
        with pytest.raises(FormatError, match="groups"):
            FORMATS[name].unpack(packed, Scheme(name, 4, wrong))


# 2:4

# By which rows of a quad are not zero: the two that are left. Peers' table.
LEFT = {
    (): (2, 3),
    (0,): (0, 2),
    (1,): (1, 2),
    (2,): (2, 3),
    (3,): (2, 3),
    (0, 1): (0, 1),
    (0, 2): (0, 2),
    (1, 2): (1, 2),
    (0, 3): (0, 3),
    (1, 3): (1, 3),
    (2, 3): (2, 3),
}


def quads(*columns, k=128, n=64, kept=None):
    """A layer of zeros but for its first quads: the first rows of the first columns."""
    codes = torch.full((k, n), 8, dtype=torch.uint8)
    for column, first in enumerate(columns):
        codes[: len(first), column] = torch.tensor(first)
    return QuantizedLinear(codes, torch.full((1, n), 0.125).half(), k, kept=kept)


def read_24(packed, group_size=-1, names=()):
    return marlin_24.unpack(packed, Scheme("marlin-24", 4, group_size, names=names))


@pytest.mark.parametrize("rows", LEFT)
@pytest.mark.parametrize("code", [0, 7, 9, 15])
def test_which_rows_of_a_quad_are_left(rows, code):
    q = quads([code if row in rows else 8 for row in range(4)])
    packed = marlin_24.pack(q)
    lo, hi = LEFT[rows]
    assert packed["B_meta"][0, 0].item() & 15 == lo + 4 * hi
    read = read_24(packed)
    assert torch.equal(read.codes, q.codes)
    assert read.kept[:4, 0].nonzero()[:, 0].tolist() == [lo, hi]


@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("first, second", [(8, 8), (8, 0), (0, 8), (0, 0), (15, 8)])
def test_what_was_kept_survives_whatever_its_code(lo, hi, first, second):
    """Sparse-MARLIN's own packer takes the code 0 of a kept -8 for a pruned weight, and moves it."""
    codes, kept = [8, 8, 8, 8], torch.zeros(128, 64, dtype=torch.bool)
    codes[lo], codes[hi] = first, second
    kept.view(-1, 4, 64)[:, :2] = True
    kept[:4, 0] = False
    kept[[lo, hi], 0] = True
    q = quads(codes, kept=kept)
    read = read_24(marlin_24.pack(q))
    assert torch.equal(read.codes, q.codes) and torch.equal(read.kept, kept)
    again = read_24(marlin_24.pack(read))
    assert torch.equal(again.kept, kept)


def test_the_largest_codes_are_not_what_is_kept():
    """Sparse-MARLIN's own packer keeps the largest signed codes: 1 and 2 of -7, -6, 1, 2."""
    with pytest.raises(FormatError, match="1 of 2048 quads have more than two non-zeros"):
        marlin_24.pack(quads([1, 2, 9, 10]))
    q = quads([1, 2, 8, 8])
    assert torch.equal(read_24(marlin_24.pack(q)).codes, q.codes)


@pytest.mark.parametrize("crowd", [[1, 2, 3, 8], [1, 2, 8, 3], [1, 8, 2, 3], [8, 1, 2, 3], [0, 1, 2, 3]])
def test_more_than_two_in_a_quad_are_refused_and_never_dropped(crowd):
    q = quads(k=256, n=128)
    q.codes[148:152, 77] = torch.tensor(crowd)
    q.codes[200:204, 3] = torch.tensor(crowd)
    words_of_it = ", ".join(map(str, crowd))
    with pytest.raises(FormatError) as refused:
        marlin_24.pack(q)
    assert str(refused.value) == (
        "2 of 8192 quads have more than two non-zeros; the first, rows 148 to 151 of column 77, "
        f"has codes {words_of_it}"
    )


def test_a_mask_that_keeps_too_much_is_refused():
    kept = torch.zeros(128, 64, dtype=torch.bool)
    kept[4:7, 5] = True
    with pytest.raises(FormatError, match=r"1 of 2048 quads .* rows 4 to 7 of column 5"):
        marlin_24.pack(quads(kept=kept))
    # one that forgets a weight loses nothing
    kept[4:7, 5] = torch.tensor([True, False, False])
    q = quads(kept=kept)
    q.codes[6, 5] = 3
    read = read_24(marlin_24.pack(q))
    assert torch.equal(read.codes, q.codes) and read.kept[4:8, 5].tolist() == [True, False, True, False]


@pytest.mark.parametrize("nibble", [n for n in range(16) if n not in (4, 8, 9, 12, 13, 14)])
def test_metadata_that_names_no_two_rows_is_refused(nibble):
    packed = marlin_24.pack(quads())
    word = packed["B_meta"][1, 64] & ~0xF0 | nibble << 4  # rows 32 + 4 ..., column 2
    packed["B_meta"][1, 64] = word
    for read in (
        lambda: read_24(packed),
        lambda: marlin_24.peculiarities({"B_meta": packed["B_meta"]}, Scheme("marlin-24", 4, -1), 128, 64),
    ):
        with pytest.raises(FormatError) as refused:
            read()
        assert str(refused.value) == (
            "the metadata of 1 of 2048 quads names no two rows; the first, rows 36 to 39 of column 2, "
            f"has {nibble}"
        )


def test_the_number_of_groups_picks_the_scale_layout_of_marlin_24():
    for k, expected in ((128, [1, 2, 3, 4, 5, 6, 7, 8]), (256, [1, 5, 2, 6, 3, 7, 4, 8])):
        q = layer(k=k)
        q.scales[0] = torch.arange(1, 65)
        packed = marlin_24.pack(q)
        assert packed["s"][0, :8].tolist() == expected
        assert torch.equal(read_24(packed, 128).scales, q.scales)


def test_scales_that_compressed_tensors_forgets_to_permute():
    """It compares the group size with half the inputs: 256 in groups of 128 stay as they are."""
    names = compressed_tensors.MARLIN_24_NAMES
    for k in (128, 256, 384):
        q = layer(k=k)
        packed = dict(zip(names, marlin_24.pack(q).values(), strict=True))
        if k == 256:
            with pytest.raises(FormatError, match="256 inputs in groups of 128"):
                read_24(packed, 128, names)
        else:
            assert torch.equal(read_24(packed, 128, names).scales, q.scales)
    assert read_24(dict(zip(names, marlin_24.pack(quads(k=256)).values(), strict=True)), -1, names).k == 256


def test_quads_of_inputs_that_do_not_divide():
    q = QuantizedLinear(torch.full((30, 8), 8, dtype=torch.uint8), torch.ones(1, 8).half(), 30)
    with pytest.raises(FormatError, match="30 inputs do not divide into quads"):
        bounds.check_quads(q)


def test_what_is_zero_is_told_by_the_zero_points():
    codes = torch.full((128, 64), 5, dtype=torch.uint8)
    codes[:2] = 8
    q = QuantizedLinear(codes, torch.ones(1, 64).half(), 128, zeros=zeros(5))
    bounds.check_quads(q)
    codes[3] = 8
    with pytest.raises(FormatError, match="64 of 2048 quads"):
        bounds.check_quads(q)
