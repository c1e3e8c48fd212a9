"""verify: it passes what is right, and every check fails for the damage it is there to find."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import rows
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, VERIFIED
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks import kernel
from marlin_convert.checks.divergence import compare
from marlin_convert.checks.kernel import _kernel_error, _OnKernel
from marlin_convert.commands import verify as story
from marlin_convert.errors import FormatError
from marlin_convert.formats import FORMATS as LAYOUTS
from marlin_convert.formats import Scheme, marlin, marlin_24
from marlin_convert.hub import Source
from marlin_convert.kernels.matmul import Marlin24Linear, MarlinLinear
from marlin_convert.models.blocks import BlockModel

FORMATS = ["marlin", "marlin-24", "gptq", "compressed-tensors"]
SCALES = {"marlin": "s", "marlin-24": "s", "gptq": "scales", "compressed-tensors": "weight_scale"}
CODES = {"marlin": "B", "marlin-24": "B_24", "gptq": "qweight", "compressed-tensors": "weight_packed"}
WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj"
SMALL_TEXT = ("--samples", 8, "--sequence-length", 256)


@pytest.fixture
def copy(quantized, tmp_path) -> Callable[[str], Path]:
    """A copy, to be damaged, of tinypy in a format."""
    return lambda format: shutil.copytree(quantized(format), tmp_path / format)


@pytest.fixture
def report(cli) -> Callable[..., dict]:
    """The report of verify, whose exit code must fit it."""

    def run(directory, *words):
        result = cli("verify", directory, "--json", "-q", *words)
        report = json.loads(result.stdout)
        assert result.exit_code == (3 if "fail" in statuses(report).values() else 0)
        assert report["passed"] is (result.exit_code == 0)
        return report

    return run


def damage(directory: Path, change: Callable[[dict], object], *, manifest: bool = True) -> Path:
    """Change the tensors, and make the manifest again so that no digest tells."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    if manifest:
        make_manifest_again(directory)
    return directory


def make_manifest_again(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def statuses(report: dict) -> dict[str, str]:
    return {name: check["status"] for name, check in report["checks"].items()}


def fails(report: dict, name: str, *words: str) -> None:
    """That check fails, with all the words in its reason and problems."""
    check = report["checks"][name]
    assert check["status"] == "fail", check
    text = " ".join([check["reason"], *check["details"]["problems"]])
    assert all(word in text for word in words), text


# What is right


@pytest.mark.parametrize("format", FORMATS)
def test_what_we_write_passes(format, copy, report):
    directory = copy(format)
    found = report(directory)
    sparsity = "pass" if format == "marlin-24" else "skipped"
    assert statuses(found) == {
        "files": "pass", "layout": "pass", "sparsity": sparsity, "numbers": "pass", "kernel": "skipped",
    }  # fmt: skip
    assert found["passed"]
    digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    assert found["manifest_sha256"] == digest
    written = (directory / VERIFIED).read_bytes()
    assert json.loads(written) == found
    assert str(directory.parent).encode() not in written
    # the report is no part of what is checked, and the same files give the same report
    assert report(directory) == found
    assert (directory / VERIFIED).read_bytes() == written


@pytest.mark.parametrize("format", FORMATS[2:])
def test_what_a_peer_wrote_passes_without_a_manifest(format, copy, report, tmp_path):
    directory = copy(format)
    (directory / MANIFEST).unlink()
    (directory / "recipe.yaml").unlink()
    found = report(directory, "--report", tmp_path / "report.json")
    assert statuses(found)["files"] == "pass" and "no manifest" in found["checks"]["files"]["reason"]
    assert found["manifest_sha256"] is None and not (directory / VERIFIED).exists()
    assert json.loads((tmp_path / "report.json").read_text()) == found


def test_figures_beside_the_source(copy, tinypy, cli):
    directory = copy("marlin")
    result = cli("verify", directory, "--source", tinypy, *SMALL_TEXT)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-1] == f"Next: marlin-convert push {directory} you/{directory.name}"
    text = json.loads((directory / VERIFIED).read_text())["checks"]["numbers"]["details"]["text"]
    assert 4 < text["source_perplexity"] < text["perplexity"] < 1.2 * text["source_perplexity"] < 20
    assert 0.005 < text["divergence"] < 0.2 and 0.8 < text["agreement"] < 1
    assert text["tokens"] == 8 * 255
    assert f"{text['perplexity']:.4f}" in result.stdout and f"{text['divergence']:.4f}" in result.stdout


def test_a_repack_has_the_codes_of_its_source(copy, quantized, report):
    found = report(copy("marlin"), "--source", quantized("gptq"), *SMALL_TEXT)
    details = found["checks"]["numbers"]["details"]
    assert all(row["error"] == 0 for row in details["weights"])
    assert details["text"]["divergence"] == pytest.approx(0, abs=1e-9) and details["text"]["agreement"] == 1


def test_scales_a_peer_wrote_in_bfloat16(copy, report):
    def change(tensors):
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].bfloat16()

    found = report(damage(copy("compressed-tensors"), change))
    assert found["passed"] and "only codes are compared" in found["checks"]["layout"]["reason"]


def test_awq_is_read(copy, report):
    """AWQ's words hold eight columns in an order of its own; only symmetric codes are here."""
    directory = copy("gptq")
    weights = Weights(Checkpoint.open(directory))

    def packed(values):
        eights = values.to(torch.int32).reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return (eights << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)

    def change(tensors):
        for linear in weights.packed_linears():
            layer = weights.quantized(linear)
            tensors[f"{linear}.qweight"] = packed(layer.codes)
            tensors[f"{linear}.qzeros"] = packed(torch.full(layer.scales.shape, 8))
            del tensors[f"{linear}.g_idx"]

    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    edit_json(directory / "config.json", quantization_config=awq)
    edit_json(directory / MANIFEST, matrices=[])  # of another maker
    found = report(damage(directory, change))
    assert found["passed"] and "not packed again" in found["checks"]["layout"]["reason"]


def test_a_dense_model_has_nothing_to_unpack(tinypy, report):
    assert statuses(report(tinypy)) == {
        "files": "pass",
        **dict.fromkeys(("layout", "sparsity", "numbers", "kernel"), "skipped"),
    }  # fmt: skip


# files


def test_a_flipped_byte(copy, report):
    directory = copy("marlin")
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-1000] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    fails(report(directory), "files", WEIGHTS, "sha256")


def test_a_report_that_was_being_written_when_verify_was_killed(copy, report):
    directory = copy("marlin")
    (directory / (VERIFIED + ".tmp")).write_text("{")
    assert statuses(report(directory))["files"] == "pass"
    assert (directory / VERIFIED).exists() and not (directory / (VERIFIED + ".tmp")).exists()


def test_an_extra_and_a_missing_file(copy, report):
    directory = copy("marlin")
    (directory / "extra.txt").write_text("x")
    (directory / "tokenizer.json").unlink()
    fails(report(directory), "files", "'extra.txt' is not in the manifest", "'tokenizer.json' is missing")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "1 scales of zero"), (float("nan"), "NaN"), (float("inf"), "NaN or Inf")]
)
def test_a_scale_that_is_none(format, value, words, copy, report):
    name = f"{Q}.{SCALES[format]}"

    def change(tensors):
        tensors[name][1, 1] = value

    found = report(damage(copy(format), change))
    fails(found, "files", name, words)
    fails(found, "layout", Q)


def test_values_that_float16_cannot_hold(copy, report):
    def change(tensors):
        tensors["model.norm.weight"][3] = 1e6

    fails(report(damage(copy("gptq"), change)), "files", "model.norm.weight", "float16 cannot")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["norm", "scales", "codes"])
def test_a_missing_tensor(format, kind, copy, report):
    name = {
        "norm": "model.layers.0.input_layernorm.weight",
        "scales": f"{Q}.{SCALES[format]}",
        "codes": f"{Q}.{CODES[format]}",
    }[kind]
    found = report(damage(copy(format), lambda tensors: tensors.pop(name)))
    assert not found["passed"] and not found["verified"]
    fails(found, "layout" if kind == "scales" else "files", name.rpartition(".")[0])


def test_tensors_too_many(copy, report, tmp_path):
    def foreign(tensors):
        tensors["model.layers.9.mlp.up_proj.B"] = tensors[f"{Q}.B"].clone()
        tensors["model.layers.9.mlp.up_proj.s"] = tensors[f"{Q}.s"].clone()

    fails(report(damage(copy("marlin"), foreign)), "files", "model.layers.9", "not of the architecture")

    def twice(tensors):
        tensors[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)

    fails(report(damage(copy("gptq"), twice)), "files", Q, "both dense and packed")


@pytest.mark.parametrize("manifest", [True, False])
def test_a_truncated_file(manifest, copy, report):
    directory = copy("gptq")
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-1000])
    if not manifest:
        (directory / MANIFEST).unlink()
    found = report(directory)
    fails(found, "files", WEIGHTS, "truncated")
    assert statuses(found)["layout"] == "skipped"


# layout


def test_what_engines_fuse_is_packed_together(copy, report):
    def change(tensors):
        for suffix in ("B", "s"):
            del tensors[f"{Q}.{suffix}"]
        tensors[f"{Q}.weight"] = torch.ones(256, 256, dtype=torch.bfloat16)

    directory = copy("marlin")
    edit_json(directory / MANIFEST, matrices=[])
    found = report(damage(directory, change))
    assert statuses(found)["files"] == "pass"
    fails(found, "layout", Q, "dense", "packed")


def test_groups_that_follow_activation_order(copy, report):
    def change(tensors):
        order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
        tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"][order]

    fails(report(damage(copy("gptq"), change)), "layout", Q, "g_idx")


def test_zeros_of_another_version(copy, report):
    def change(tensors):
        tensors[f"{Q}.qzeros"].fill_(-0x77777778)

    fails(report(damage(copy("gptq"), change)), "layout", f"{Q}.qzeros", "packing")


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_of_another_shape(format, copy, report):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(Q)]:
            tensors[name] = tensors[name.replace("self_attn.q_proj", "mlp.up_proj")].clone()

    fails(report(damage(copy(format), change)), "layout", Q, "256 inputs and 768 outputs")


def test_a_config_of_another_shape(copy, report):
    directory = copy("marlin")
    edit_json(directory / "config.json", vocab_size=4000, intermediate_size=1024)
    make_manifest_again(directory)
    fails(report(directory), "layout", "model.embed_tokens.weight", "mlp.down_proj")


@pytest.mark.parametrize("group_size", [64, -1])
def test_a_config_of_another_group_size(group_size, copy, report):
    directory = copy("marlin")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_json(directory / "config.json", quantization_config=config | {"group_size": group_size})
    make_manifest_again(directory)
    fails(report(directory), "layout", Q, "groups")


# sparsity


@pytest.fixture
def pruned(quantized, cli, tmp_path) -> Callable[..., Path]:
    """What is 2:4 in tinypy, in a format, made of that in marlin-24, or of another source."""

    def make(format, *words, source=None):
        words = ("-o", tmp_path / "pruned", "--format", format, "-q", *words)
        assert cli("quantize", source or quantized("marlin-24"), *words).exit_code == 0
        return tmp_path / "pruned"

    return make


QUADS = 4 * (4 * 256 * 256 + 3 * 256 * 768) // 4  # of four blocks, each of q, k, v, o and gate, up, down


def test_every_quad_is_counted(copy, report, cli):
    directory = copy("marlin-24")
    check = report(directory)["checks"]["sparsity"]
    assert check["reason"] == f"100.00 % of {QUADS} quads"
    assert check["details"] == {"linears": 28, "quads": QUADS, "sparse_quads": QUADS}
    assert f"sparsity pass     100.00 % of {QUADS} quads" in cli("verify", directory).stdout.splitlines()


def test_without_a_claim_there_is_nothing_to_count(copy, report):
    assert report(copy("gptq"))["checks"]["sparsity"]["reason"] == "nothing is said to be 2:4"


@pytest.mark.parametrize("format", ["marlin", "gptq", "compressed-tensors"])
def test_a_claim_is_checked_in_every_format(format, pruned, report):
    directory = pruned(format)
    assert report(directory)["checks"]["sparsity"]["reason"] == f"100.00 % of {QUADS} quads"
    layout = LAYOUTS[format]

    def change(tensors):
        weights = Weights(Checkpoint.open(directory))
        layer = weights.quantized(Q)
        layer.codes[100:104, 7] = torch.tensor([1, 2, 3, 4])
        layer.codes[8:12, 9] = torch.tensor([8, 2, 3, 4])
        tensors |= {f"{Q}.{suffix}": tensor for suffix, tensor in layout.pack(layer).items()}

    found = report(damage(directory, change))
    # all but two in half a million: not to be rounded to 100
    fails(
        found, "sparsity", f"99.99 % of {QUADS} quads", f"{Q} is not 2:4: 2 of 16384 quads",
        "rows 8 to 11 of column 9, has codes 8, 2, 3, 4",
    )  # fmt: skip
    assert found["checks"]["sparsity"]["details"]["sparse_quads"] == QUADS - 2
    assert not found["passed"]


def test_metadata_that_makes_no_sense(copy, report):
    def change(tensors):
        tensors[f"{Q}.B_meta"][3, 5] |= 15

    found = report(damage(copy("marlin-24"), change))
    words = (Q, "the metadata of 1 of 16384 quads names no two rows")
    fails(found, "layout", *words)
    fails(found, "sparsity", "1 linears cannot be read", *words)


def test_a_part_that_is_sparse(pruned, report, cli):
    directory = pruned("marlin-24", "--unpruned", "*.1.mlp.*")
    found = report(directory)
    assert found["passed"]
    assert found["checks"]["layout"]["reason"] == "25 marlin-24 and 3 marlin linears"
    quads = QUADS - 3 * 256 * 768 // 4
    assert found["checks"]["sparsity"]["reason"] == f"100.00 % of {quads} quads"
    assert found["checks"]["sparsity"]["details"]["linears"] == 25


def test_what_engines_fuse_is_in_one_layout(pruned, report):
    directory = pruned("marlin-24")
    up = "model.layers.1.mlp.up_proj"
    path = directory / "config.json"
    config = json.loads(path.read_text())["quantization_config"] | {"unpruned": [up]}
    edit_json(path, quantization_config=config)

    def change(tensors):
        found = {f"{up}.{suffix}": tensors.pop(f"{up}.{suffix}") for suffix in marlin_24.SUFFIXES}
        layer = marlin_24.unpack(
            {name.rpartition(".")[2]: tensor for name, tensor in found.items()}, Scheme("marlin-24", 4, 128)
        )
        tensors |= {f"{up}.{suffix}": tensor for suffix, tensor in marlin.pack(layer).items()}

    found = report(damage(directory, change))
    fails(found, "layout", f"{up} marlin", "model.layers.1.mlp.gate_proj marlin-24", "which engines fuse")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bits": 8}, "is stored as gptq 4 128 by config.json, gptq 8 128 by the manifest"),
        ({"group_size": 64}, "is stored as gptq 4 128 by config.json, gptq 4 64 by the manifest"),
        ({"format": "marlin"}, "gptq 4 128 by config.json, marlin 4 128 by the manifest"),
        ({"format": "dense"}, "is packed, the manifest says that it is dense"),
        ({"scales": "positive"}, "are signed, the manifest says positive"),
        ({"k": 512}, "with 512 inputs and 256 outputs, as the manifest says"),
        ({"name": "model.layers.0.self_attn.z_proj"}, "z_proj is not packed, the manifest says that it is"),
        ({"name": "model.layers.0.self_attn.z_proj"}, f"{Q} is packed, and the manifest has no row of it"),
        ({"k": None}, "k is None"),
        ({"sparse": "yes"}, "sparse is 'yes'"),
        ({"reason": 3}, "reason is 3"),
    ],
)
def test_a_record_that_is_not_true_of_the_tensors(change, said, copy, report):
    directory = copy("gptq")
    found = json.loads((directory / MANIFEST).read_text())["matrices"]
    index = next(i for i, row in enumerate(found) if row["name"] == Q)
    found[index] |= change
    edit_json(directory / MANIFEST, matrices=found)
    fails(report(directory), "files", said)


def test_a_sparse_checkpoint_is_verified_with_its_sparsity(copy, report):
    directory = copy("marlin-24")
    assert not report(directory, "--checks", "files,layout,numbers")["verified"]
    assert not (directory / VERIFIED).exists()
    assert report(directory, "--checks", "files,layout,sparsity,numbers")["verified"]
    assert (directory / VERIFIED).exists()
    assert report(copy("gptq"), "--checks", "files,layout,numbers")["verified"]


def test_what_was_asked_for_passed_though_it_is_no_whole_verification(copy, report, cli):
    """`passed` is 0 as an exit status; `verified` says whether the checkpoint may be pushed."""
    directory = copy("marlin")
    found = report(directory, "--checks", "files")
    assert (found["passed"], found["verified"]) == (True, False)
    assert not (directory / VERIFIED).exists()
    in_vain = cli("verify", directory, "--checks", "files", "--require-kernel", "--json", "-q")
    assert in_vain.exit_code == 1 and json.loads(in_vain.stdout)["passed"] is False


@pytest.mark.parametrize("claim", [[], {"a": 1}, "2:4 ", 3])
def test_a_claim_that_is_none(claim, copy, report):
    """As an earlier version might have written it."""
    directory = copy("gptq")
    manifest = rows.earlier(json.loads((directory / MANIFEST).read_text()))
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sparsity": claim, "unpruned": [Q]}))
    assert statuses(report(directory))["sparsity"] == "skipped"


# numbers


def test_swapped_scales_show_beside_the_source(copy, tinypy, report):
    name = f"{Q}.scales"

    def change(tensors):
        row = tensors[name][0]
        pair = [int(row.argmin()), int(row.argmax())]
        tensors[name][:, pair] = tensors[name][:, pair[::-1]]

    directory = damage(copy("gptq"), change)
    assert report(directory)["passed"]
    fails(report(directory, "--source", tinypy, *SMALL_TEXT), "numbers", Q, "an output")


@pytest.mark.parametrize("error", [0.55, 0.9])
def test_a_weight_too_far_from_the_source_s(error, copy, tinypy, report):
    """Of the right direction, and every output nearer than zeros would be."""
    linear = "model.layers.0.mlp.up_proj"

    def shrink(tensors):
        tensors[f"{linear}.scales"] *= 1 - error

    found = report(damage(copy("gptq"), shrink), "--source", tinypy, "--samples", "2")
    fails(found, "numbers", linear, "from the source's, relative; at most 0.5")


def test_a_wrong_permutation_shows_beside_the_source(copy, tinypy, report):
    def change(tensors):
        for name in tensors:
            if name.endswith(".s"):
                tensors[name] = tensors[name].reshape(-1, 4, 8).transpose(1, 2).reshape(tensors[name].shape)

    directory = damage(copy("marlin"), change)
    found = report(directory, "--source", tinypy, *SMALL_TEXT)
    assert [statuses(found)[name] for name in ("files", "layout")] == ["pass", "pass"]
    fails(found, "numbers", Q, "perplexity")


def test_itself_as_source(copy, cli):
    """It would count as verified, with a divergence of zero on the card."""
    directory = copy("gptq")
    result = cli("verify", directory, "--source", directory / ".." / directory.name)
    assert result.exit_code == 1 and "is the checkpoint itself" in result.stderr


def test_another_model_as_source(copy, report, tmp_path):
    other = tiny_models.save(tiny_models.build("llama"), tmp_path / "other")
    fails(report(copy("marlin"), "--source", other, *SMALL_TEXT), "numbers", "in the source")


def test_a_product_beyond_the_tolerance(copy, report):
    fails(report(copy("marlin"), "--tolerance", 1e-12), "numbers", Q, "product")


def test_linears_rounded_to_nearest(copy, report, cli):
    directory = copy("marlin")
    found = json.loads((directory / MANIFEST).read_text())["matrices"]
    found[3]["rounded_to_nearest"] = True
    edit_json(directory / MANIFEST, matrices=found)
    assert f"rounded to nearest: {found[3]['name']}" in cli("verify", directory).stdout.splitlines()
    fails(report(directory, "--strict"), "numbers", found[3]["name"])


def test_hidden_states_far_from_the_originals(copy, report, tinypy):
    """By what the manifest says of the calibration text, and by the text that is run here."""
    directory = copy("marlin")
    manifest = json.loads((directory / MANIFEST).read_text())
    assert len(manifest["divergence"]) == 4
    words = ("--source", tinypy, *SMALL_TEXT, "--strict")
    text = report(directory, *words)["checks"]["numbers"]["details"]["text"]
    assert len(text["hidden"]) == 4 and 0.01 < text["hidden"][0] < text["hidden"][-1] < 0.5
    edit_json(directory / MANIFEST, divergence=[0.1, 0.2, 0.61, 0.3])
    fails(report(directory, "--strict"), "numbers", "after block 2 are 0.61", "the calibration text")
    assert report(directory)["checks"]["numbers"]["status"] == "pass"


def test_a_model_compared_with_itself(tmp_path):
    """Block by block, the perplexity is the one that transformers computes."""
    model = tiny_models.build("qwen3")
    weights = Weights(Checkpoint.open(tiny_models.save(model, tmp_path / "model")))
    ids = torch.randint(0, 4096, (3, 300), generator=torch.Generator().manual_seed(0))
    one, other = (BlockModel(weights, torch.device("cpu"), fast=False) for _ in range(2))
    found = compare(one, other, ids)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert found.perplexity == found.source_perplexity == pytest.approx(expected, rel=1e-4)
    assert asdict(found) | {"tokens": 3 * 299, "divergence": 0, "agreement": 1, "margin": 0} == asdict(found)


# kernel, options, and what can be no checkpoint


@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_check_never_passes_unrun(format, copy, cli):
    directory = copy(format)
    result = cli("verify", directory, "--require-kernel")
    assert result.exit_code == 1
    said = "Error: the kernel check is required and could not run: no CUDA GPU here."
    assert result.stderr.splitlines()[-1] == said
    assert not json.loads((directory / VERIFIED).read_text())["passed"]


def test_a_gpu_without_a_kernel(quantized, mixed, report, monkeypatch):
    directories = quantized("marlin-24"), mixed  # made before there seems to be a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for directory in directories:
        check = report(directory, "--checks", "kernel", "--device", "cuda")["checks"]["kernel"]
        assert check["status"] == "skipped"
        assert check["reason"].startswith("there is no kernel for compute capability 7.5")


def test_every_layout_goes_to_its_own_kernel(mixed):
    """On a CPU, where the modules of the kernels multiply by the dequantized weights."""
    weights, device = Weights(Checkpoint.open(mixed)), torch.device("cpu")
    model = _OnKernel(weights, device, fast=False)
    block = model.load(0)
    kernels = [block.get_submodule(name).forward.__self__ for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert [type(kernel) for kernel in kernels] == [Marlin24Linear, MarlinLinear]
    assert all(kernel.bias is not None for kernel in kernels)
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    found = compare(BlockModel(weights, device, fast=False), model, ids)
    assert found.divergence < 1e-6 and found.agreement == 1
    for linear in weights.packed_linears():
        assert _kernel_error(weights.quantized(linear), weights.scheme_of(linear).format, device) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
def test_every_layout_on_a_gpu(format, quantized, mixed, report):
    directory = mixed if format == "mixed" else quantized(format)
    check = report(directory, "--checks", "kernel", "--require-kernel")["checks"]["kernel"]
    assert check["status"] == "pass", check
    packed = Weights(Checkpoint.open(directory)).packed_linears()
    assert [row["name"] for row in check["details"]["linears"]] == packed


def test_checks_that_were_not_asked_for_are_said_to_be_skipped(copy, report):
    found = report(copy("marlin"), "--checks", "layout")
    assert statuses(found) == {
        **dict.fromkeys(("files", "sparsity", "numbers", "kernel"), "skipped"),
        "layout": "pass",
    }  # fmt: skip
    assert found["checks"]["files"]["reason"] == "not asked for"


def test_wrong_usage(quantized, cli):
    result = cli("verify", quantized("marlin"), "--checks", "files,magic")
    assert result.exit_code == 2 and "magic" in result.stderr


def test_no_checkpoint(tmp_path, cli):
    for directory in (tmp_path, tmp_path / "absent"):
        result = cli("verify", directory)
        assert result.exit_code == 1 and result.stderr.splitlines()[-2].startswith("Error: ")


def test_an_unknown_format_is_no_difference(copy, cli):
    directory = copy("gptq")
    (directory / MANIFEST).unlink()
    edit_json(directory / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    result = cli("verify", directory)
    assert result.exit_code == 1 and "bitsandbytes" in result.stderr


def test_a_report_that_cannot_be_written(copy, tmp_path, cli):
    directory = copy("marlin")
    result = cli("verify", directory, "--checks", "layout", "--report", tmp_path / "absent" / "report.json")
    assert result.exit_code == 2 and "absent" in result.stderr
    assert not (directory / VERIFIED).exists()


def test_text_that_is_too_short(quantized, tinypy, tmp_path, cli):
    (tmp_path / "short.txt").write_text("short")
    words = ("--source", tinypy, "--text", tmp_path / "short.txt")
    result = cli("verify", quantized("marlin"), *words)
    assert result.exit_code == 1 and "16384" in result.stderr


# What was found is reported, whatever comes after it


def test_a_kernel_that_is_wrong_and_then_refuses(quantized, monkeypatch):
    """There is no GPU here: what it would say of two linears is made up, the check is not."""
    said = iter([0.7, FormatError("marlin needs outputs divisible by 64, has 96")])

    def kernel_error(*_: object) -> float:
        found = next(said, 0.0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel, "_kernel_error", kernel_error)
    source = Source(quantized("marlin"), "marlin", None)
    job = story.Job(source, frozenset({"kernel"}), torch.device("cuda"))
    done = story.verify(job)
    check = done.checks["kernel"]
    assert check.status == "fail" and done.failed
    wrong, unfinished = check.details["problems"]
    assert "the kernel is 7.0e-01 off" in wrong
    assert "cannot hold 1 of 28 linears" in unfinished and "27 were compared" in unfinished


@pytest.mark.parametrize("tolerance, status", [(1e-30, "fail"), (1e-3, "skipped")])
def test_memory_that_runs_out_half_way(tolerance, status, quantized, tinypy):
    """It hides nothing that was found, and is no success."""

    def run_out(blocks: range, total: int) -> Iterator[int]:
        yield from blocks[:1]
        raise torch.OutOfMemoryError("CUDA out of memory")

    directory = quantized("marlin")
    job = story.Job(
        Source(directory, "marlin", None), frozenset({"files", "numbers"}), torch.device("cpu"),
        source=Source(tinypy, "tinypy", None), tolerance=tolerance, samples=2, sequence_length=64,
    )  # fmt: skip
    done = story.verify(job, run_out)
    check = done.checks["numbers"]
    assert check.status == status and not done.passed
    assert "CUDA out of memory" in " ".join([check.reason, *check.details.get("problems", [])])
    assert done.failed == (status == "fail") and done.could_not_run == ["numbers"] * (status == "skipped")
    if status == "fail":
        assert len(check.details["problems"]) == 29


def test_a_config_that_is_another_and_means_no_model(copy, report):
    directory = copy("marlin")
    edit_json(directory / "config.json", model_type="mamba")
    fails(report(directory), "files", "'config.json' has", "backbone.embeddings.weight")


def test_a_difference_takes_back_an_earlier_pass(copy, report):
    directory = copy("marlin")
    assert report(directory)["passed"]
    report(directory, "--checks", "numbers")
    assert json.loads((directory / VERIFIED).read_text())["passed"], "a part does not take the place of all"
    fails(report(directory, "--checks", "numbers", "--tolerance", 1e-30), "numbers")
    assert not json.loads((directory / VERIFIED).read_text())["passed"]


def test_a_report_inside_of_the_checkpoint_is_refused(copy, cli):
    """The next verification would find a file that the manifest does not know."""
    directory = copy("gptq")
    result = cli("verify", directory, "--checks", "files", "--report", directory / "report.json")
    assert result.exit_code == 1 and "its manifest does not know" in result.output
    assert not (directory / "report.json").exists()
