"""--effort high: what it makes is nearer to the original; a run that is stopped goes on to the same bytes."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from runs import contents, partial
from transformers import LlamaConfig

from marlin_convert import tune
from marlin_convert.calibration import calibrate, load_tokenizer, tuning_text
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checkpoint.writer import ShardWriter
from marlin_convert.checks.divergence import compare
from marlin_convert.commands import quantize as story
from marlin_convert.commands.quantize import Report
from marlin_convert.errors import ConvertError
from marlin_convert.estimate import tuning_memory
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel
from marlin_convert.plan import make_plan
from marlin_convert.ranks import Ranks, Share
from marlin_convert.recipe import Recipe
from marlin_convert.report import plan_text, summary_text
from marlin_convert.student import Student

CPU = torch.device("cpu")
LICENSE = (Path(__file__).parents[1] / "LICENSE").read_text()
JUDGED = 3000  # characters at its end, which nothing is tuned on


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 512 tokens: a text of some thousand has a few of them."""
    monkeypatch.setattr(tune, "STEP", 128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LICENSE[:-JUDGED])
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, with biases and a head of its own."""
    model = tiny_models.build("llama", torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("model") / "llama")


def job(model: Path, output: Path, text: Path, **settings: Any) -> story.Job:
    recipe = {"samples": 4, "sequence_length": 64, "calibration": str(text), "effort": "high", **settings}
    return story.Job(Source(model, model.name, None), output, Recipe(**recipe), CPU)


@pytest.fixture(scope="module")
def made(
    llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Report]]:
    """The random Llama converted, once for all settings that are the same."""

    @cache
    def make(**settings: Any) -> tuple[Path, Report]:
        output = tmp_path_factory.mktemp("made") / "out"
        return output, story.quantize(job(llama, output, text, **settings))

    return make


def divergence(model: Path, output: Path) -> float:
    """On a text that was not tuned on."""
    ids = torch.tensor(load_tokenizer(Source(model, "model", None))(LICENSE[-JUDGED:])["input_ids"])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    models = [BlockModel(Weights(Checkpoint.open(one)), CPU, fast=False) for one in (model, output)]
    return compare(models[0], models[1], ids).divergence


SPARSE = {"format": "marlin-24", "sparsity": "2:4"}


@pytest.mark.parametrize("settings", [{}, SPARSE], ids=["int4", "2:4"])
def test_it_answers_nearer_to_the_original_than_the_default(
    settings: dict[str, str], made: Callable[..., tuple[Path, Report]], llama: Path
) -> None:
    output, done = made(**settings)
    default, _ = made(**settings, effort="default")
    tuning = done.manifest["tuning"]
    assert tuning["kept"] and tuning["held_out_divergence"]["tuned"] < tuning["held_out_divergence"]["solved"]
    assert divergence(llama, output) < 0.99 * divergence(llama, default)
    layers = [
        Weights(Checkpoint.open(one)).quantized("model.layers.1.mlp.up_proj") for one in (output, default)
    ]
    assert not torch.equal(layers[0].scales, layers[1].scales)
    if settings:  # a code that is kept may become 0
        masks = [layer.kept for layer in layers]
        assert masks[0] is not None and masks[1] is not None and torch.equal(masks[0], masks[1])
    else:
        assert not torch.equal(layers[0].codes, layers[1].codes)


def test_norms_after_attention_and_mlp_and_a_capped_head_are_tuned_too(text: Path, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("gemma2", torch.bfloat16), tmp_path / "gemma2")
    tuning = story.quantize(job(source, tmp_path / "out", text)).manifest["tuning"]
    assert tuning["kept"] and len(tuning["tensors"]) == 4 * 2 + 1


def test_scales_and_norms_are_tuned_and_nothing_else(
    made: Callable[..., tuple[Path, Report]], llama: Path
) -> None:
    output, done = made()
    source, weights = (Weights(Checkpoint.open(one)) for one in (llama, output))
    dense = [name for name in weights.checkpoint.tensors if not weights.is_packed(name.rpartition(".")[0])]
    changed = {name for name in dense if not torch.equal(source.read(name), weights.read(name))}
    norms = {
        f"model.layers.{i}.{kind}_layernorm.weight" for i in (0, 1) for kind in ("input", "post_attention")
    }
    assert changed == {*norms, "model.norm.weight"} == set(done.manifest["tuning"]["tensors"])
    assert all(weights.dtype(name) == torch.bfloat16 for name in changed)


def test_positive_scales_stay_positive(made: Callable[..., tuple[Path, Report]]) -> None:
    output, done = made(scales="positive")
    weights = Weights(Checkpoint.open(output))
    assert all((weights.quantized(name).scales > 0).all() for name in weights.packed_linears())
    assert done.manifest["tuning"]["steps"] > 10


@pytest.mark.parametrize(
    "settings",
    [{}, SPARSE, {"format": "gptq", "bits": 8}, {"format": "compressed-tensors", "group_size": 64}],
    ids=["marlin", "marlin-24", "gptq, 8 bits", "compressed-tensors"],
)
def test_every_format_is_verified_against_the_source(
    settings: dict[str, Any], made: Callable[..., tuple[Path, Report]], llama: Path, text: Path,
    tmp_path: Path, cli: Callable[..., Result],
) -> None:  # fmt: skip
    output, done = made(**settings)
    assert done.manifest["tuning"]["steps"] > 10
    copy = shutil.copytree(output, tmp_path / "copy")  # for verify writes a report into it
    words = ["--source", llama, "--text", text, "--samples", 2, "--sequence-length", 64]
    result = cli("verify", copy, *words, "--strict", "--device", "cpu")
    assert result.exit_code == 0, result.output


def stop(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, call: int) -> None:
    """Let the `call`-th call of a function be the last thing a run comes to."""
    function, calls = getattr(holder, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(holder, name, counted)


def interrupt(one: story.Job, holder: Any, name: str, call: int) -> None:
    """Run until the `call`-th call of a function, and keep all that is found until then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "KEEP_AFTER", 0.0)
        stop(patch, holder, name, call)
        with pytest.raises(KeyboardInterrupt):
            story.quantize(one)


def test_stopped_while_it_solves_tunes_and_writes_it_goes_on_to_the_same_bytes(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    whole, _ = made()
    one = job(llama, tmp_path / "out", text)
    for holder, name, call, log in (
        (tune, "keep", 2, ""),
        (Student, "learn", 8, "resuming at block 1"),
        (ShardWriter, "write", 9, "resuming at step 7 of the tuning"),
    ):
        interrupt(replace(one, resume=bool(log)), holder, name, call)
        assert log in caplog.text
        assert partial(one.output).is_dir() and not one.output.exists()
    with pytest.raises(ConvertError, match="2 blocks"):
        story.quantize(one)
    done = story.quantize(replace(one, resume=True))
    assert contents(one.output) == contents(whole)
    assert not partial(one.output).exists() and done.tuned


def test_a_disk_that_takes_no_more_stops_it_with_a_word(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As it keeps what is solved, and what is tuned, which takes more: a limit on file size stands for it."""
    monkeypatch.setattr(tune, "KEEP_AFTER", 0.0)
    one = job(llama, tmp_path / "out", text)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most, kept in ((16_384, []), (400_000, ["0.safetensors", "1.safetensors"])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
        try:
            with pytest.raises(ConvertError, match=r"no space left for .*out' \(File too large\)") as error:
                story.quantize(replace(one, resume=bool(kept)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert error.value.hint == "free some and continue with --resume."
        assert sorted(path.name for path in (partial(one.output) / "solved").glob("*.safetensors")) == kept
    story.quantize(replace(one, resume=True))
    assert contents(one.output) == contents(made()[0])


def test_what_is_kept_and_damaged_or_gone_is_not_gone_on_from(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path
) -> None:
    """Each file of what is solved, and of what is tuned; the run goes on when it is there again."""
    one = job(llama, tmp_path / "out", text)
    interrupt(one, Student, "learn", 8)
    files = [path for name in ("solved", "tuning") for path in (partial(one.output) / name).iterdir()]
    assert len(files) == 5  # two blocks, and what is in none
    for file in files:
        data = file.read_bytes()
        for damaged in (None, data[:-1], b"x" * 8 + data[8:]):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(ConvertError, match=f"{file.name}', .* is damaged or gone") as error:
                story.quantize(replace(one, resume=True))
            assert error.value.hint == "remove the unfinished directory and start again."
            file.write_bytes(data)
    story.quantize(replace(one, resume=True))
    assert contents(one.output) == contents(made()[0])


def test_it_is_whole_or_not_there_wherever_it_is_stopped(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is tuned, when what was kept before is being removed."""
    monkeypatch.setattr(tune, "KEEP_AFTER", 0.0)
    one = job(llama, tmp_path / "out", text)
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(path: Path, **options: Any) -> None:
            if path.is_dir():
                next(path.iterdir()).unlink()
                raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            story.quantize(one)
    assert len(list((partial(one.output) / "tuning").iterdir())) == 3
    story.quantize(replace(one, resume=True))
    assert contents(one.output) == contents(made()[0])


def test_an_abandoned_run_leaves_nothing_to_the_next(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path
) -> None:
    one = job(llama, tmp_path / "out", text)
    interrupt(replace(one, recipe=one.recipe.changed({"seed": 5})), Student, "learn", 4)
    with pytest.raises(ConvertError, match="seed"):
        story.quantize(replace(one, resume=True))
    story.quantize(replace(one, overwrite=True))
    assert contents(one.output) == contents(made()[0])


def test_the_solvers_codes_are_written_where_tuning_does_harm(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tune, "DENSE", tune.Rates(1, 1.0, 1.0))  # every code anywhere
    done = story.quantize(job(llama, tmp_path / "out", text))
    tuning = done.manifest["tuning"]
    assert not tuning["kept"] and not tuning["tensors"]
    assert tuning["steps"] < 10  # it was stopped half-way
    default, _ = made(effort="default")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        default / "model.safetensors"
    ).read_bytes()


def test_a_model_that_does_not_fit_is_refused_before_work(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "free_memory", lambda device: 1_000_000)
    with pytest.raises(ConvertError, match=r"--effort high takes 0\.\d GB of memory on cpu") as refusal:
        story.plan_job(job(llama, tmp_path / "out", text))
    assert "--effort default" in str(refusal.value.hint)
    for here, said in ((2, " in each of 2 processes; "), (1, "what it learns; ")):  # memory is a machine's
        ranks = Ranks(0, 2, of_machine=Share(0, here))
        with pytest.raises(ConvertError, match=said):
            story.plan_job(replace(job(llama, tmp_path / "out", text), ranks=ranks))
    assert list(tmp_path.iterdir()) == []
    story.plan_job(job(llama, tmp_path / "out", text, effort="default"))


def test_an_8b_fits_80_gb(tmp_path: Path) -> None:
    """Planned from headers alone, as always."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    source = tiny_models.headers_only(config, tmp_path)
    plan = make_plan(Weights(Checkpoint.open(source)), Recipe(effort="high", sequence_length=1024))
    needed = tuning_memory(plan, torch.device("cuda"))
    assert 60e9 < needed < 80e9
    sparse = make_plan(
        Weights(Checkpoint.open(source)),
        Recipe(effort="high", sequence_length=1024, sparsity="2:4", format="marlin-24"),
    )
    assert tuning_memory(sparse, torch.device("cuda")) == pytest.approx(needed + 6.98e9, rel=0.01)


def test_where_no_codes_are_made_it_is_refused(
    made: Callable[..., tuple[Path, Report]], llama: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    pruned = cli("sparsify", llama, "-o", tmp_path / "out", "--effort", "high")
    assert pruned.exit_code == 1 and "pruning alone makes none" in pruned.output
    repacked = cli("quantize", made()[0], "-o", tmp_path / "out", "--effort", "high", "--format", "gptq")
    assert repacked.exit_code == 1 and "--requantize" in repacked.output


def test_text_beyond_the_calibration_is_tuned_on_and_what_judges_is_not(llama: Path, text: Path) -> None:
    tokenizer = load_tokenizer(Source(llama, "llama", None))
    drawn = calibrate(tokenizer, str(text), samples=4, length=64, seed=3).ids
    found = tuning_text(tokenizer, str(text), samples=4, length=64, seed=3, tokens=20 * 64, held_out=4 * 64)
    assert torch.equal(found.ids[:4], drawn)
    assert found.ids.shape == (20, 64) and found.held_out.shape == (4, 64)
    rows = {tuple(row) for row in torch.cat((found.ids, found.held_out)).tolist()}
    assert len(rows) == 24
    half = len(tokenizer(text.read_text())["input_ids"]) // 2
    few = tuning_text(tokenizer, str(text), samples=1, length=half, seed=0, tokens=10**6, held_out=10**6)
    assert len(few.held_out) == len(few.ids) == 1
    with pytest.raises(ConvertError, match="one window"):
        tuning_text(tokenizer, str(text), samples=1, length=half + 1, seed=0, tokens=10**6, held_out=10**6)


def test_the_plan_and_the_summary_tell_of_it(
    made: Callable[..., tuple[Path, Report]], llama: Path, text: Path, tmp_path: Path
) -> None:
    one = job(llama, tmp_path / "out", text)
    _, plan = story.plan_job(one)
    assert "then codes, scales and norms are tuned: 1 epoch" in plan_text(plan, one)
    output, done = made()
    held_out = done.manifest["tuning"]["held_out_divergence"]
    assert f"{held_out['solved']:.5f} -> {held_out['tuned']:.5f}" in summary_text(
        done, replace(one, output=output)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("more", [{}, {"sparsity": "2:4", "format": "marlin-24"}], ids=["dense", "2:4"])
def test_on_a_gpu_it_is_the_same_every_time(
    more: dict[str, str], tinypy: Path, text: Path, tmp_path: Path
) -> None:
    """Where it is not asked for, attention's gradients are summed up in any order."""
    found = []
    for name in ("one", "other"):
        todo = replace(job(tinypy, tmp_path / name, text, **more), device=torch.device("cuda:0"))
        report = story.quantize(todo)
        assert report.manifest["tuning"]["steps"] > 10
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]
