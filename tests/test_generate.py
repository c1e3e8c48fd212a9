"""generate: text through transformers, in the chat template where there is one, beside another model's."""

import json
import re
import shutil
from pathlib import Path

import packed_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import marlin_convert
from marlin_convert import ConvertError

PROMPT = "def __init__(self, name):"
TEMPLATE = (
    "{% for one in messages %}# {{ one.role }}: {{ one.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(quantized, tmp_path_factory) -> Path:
    """A checkpoint with a chat template."""
    directory = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(quantized("marlin"), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def plain(quantized, tmp_path_factory) -> Path:
    """The same checkpoint with its codes written out in the type it computes in, for transformers alone."""
    directory = tmp_path_factory.mktemp("plain") / "plain"
    return packed_models.dequantize(quantized("marlin"), directory, torch.bfloat16)


def greedy(directory: Path, text: str, tokens: int) -> tuple[list[int], str]:
    """What transformers alone goes on with, one likeliest token after the other."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, start:].tolist(), tokenizer.decode(ids[0, start:])


def test_it_is_what_the_dequantized_weights_go_on_with(quantized, plain):
    tokens, text = greedy(plain, PROMPT, 12)
    done = marlin_convert.generate(quantized("marlin"), PROMPT, max_new_tokens=12)
    assert (list(done.answer.tokens), done.answer.text) == (tokens, text)
    assert done.answer.model == "marlin" and done.compared is None and done.same_tokens is None
    assert done.answer.tokens_per_second == 12 / done.answer.seconds > 0


def test_the_original_answers_beside_it(quantized, tinypy, cli):
    done = marlin_convert.generate(quantized("marlin"), PROMPT, compare=tinypy, max_new_tokens=12)
    assert done.compared is not None
    tokens, text = greedy(tinypy, PROMPT, 12)
    assert (list(done.compared.tokens), done.compared.text) == (tokens, text)
    same = next(
        (i for i, pair in enumerate(zip(done.answer.tokens, tokens, strict=True)) if len({*pair}) == 2), 12
    )
    assert done.same_tokens == same

    words = ("generate", quantized("marlin"), "--prompt", PROMPT, "--compare", tinypy, "--max-new-tokens", 12)
    shown = cli(*words).stdout
    ours, theirs = shown.split("tinypy-4m:\n")
    assert ours.startswith(f"marlin:\n{PROMPT}{done.answer.text}\n(12 tokens, ")
    assert theirs.startswith(f"{PROMPT}{text}\n(12 tokens, ") and " a second)\n" in theirs
    assert f"the first {same} of 12 tokens are the same\nNext: marlin-convert verify " in theirs

    found = json.loads(cli(*words, "--json").stdout)
    assert found["prompt"] == PROMPT and found["same_tokens"] == same
    assert [one["text"] for one in found["answers"]] == [done.answer.text, text]
    assert {one["tokens"] for one in found["answers"]} == {12}


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_on_a_gpu_every_token_is_the_likeliest(format, quantized, tmp_path):
    """By the dequantized weights in float32, or as good as: 16 bits are rounded otherwise on a GPU."""
    answer = marlin_convert.generate(quantized(format), PROMPT, device="cuda", max_new_tokens=32).answer
    directory = packed_models.dequantize(quantized(format), tmp_path / "plain", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt").input_ids
    tokens = torch.tensor(answer.tokens)
    with torch.no_grad():
        logits = model(input_ids=torch.cat((ids, tokens[None]), 1)).logits[0, ids.shape[1] - 1 : -1]
    behind = logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]
    assert len(tokens) == 32 and behind.max() < 0.2


def test_quiet_is_the_text_alone(quantized, plain, cli):
    result = cli("generate", quantized("marlin"), "--prompt", PROMPT, "--max-new-tokens", 12, "-q")
    assert result.stdout == PROMPT + greedy(plain, PROMPT, 12)[1] + "\n"
    assert result.exit_code == 0


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_without_a_prompt_it_writes_something(format, quantized, cli):
    result = cli("generate", quantized(format), "--max-new-tokens", 4)
    assert result.exit_code == 0 and "(4 tokens, " in result.stdout


def test_a_prompt_is_put_into_the_chat_template(chatty, plain):
    done = marlin_convert.generate(chatty, "sort a list", max_new_tokens=8)
    assert list(done.answer.tokens) == greedy(plain, "# user: sort a list\n# assistant:", 8)[0]


def test_a_conversation_goes_on(chatty, plain, cli):
    first = greedy(plain, "# user: sort a list\n# assistant:", 8)[1]
    so_far = f"# user: sort a list\n# assistant: {first}\n# user: backwards\n# assistant:"
    second = greedy(plain, so_far, 8)
    messages = [
        {"role": "user", "content": "sort a list"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "backwards"},
    ]
    done = marlin_convert.generate(chatty, messages, max_new_tokens=8)
    assert list(done.answer.tokens) == second[0]

    result = cli(
        "generate", chatty, "--chat", "--max-new-tokens", 8, "-q", typed="sort a list\n\nbackwards\n"
    )
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second[1]}\n"


def test_what_a_template_refuses_is_an_error_of_the_template(chatty, tmp_path):
    directory = shutil.copytree(chatty, tmp_path / "strict")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(ConvertError, match=r"chat template of strict does not take this.*no system here"):
        marlin_convert.generate(directory, "hello")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("no/such/directory",), 1, "'no/such/directory' is neither a directory nor a Hub id"),
        ((".",), 1, "has no config.json"),
        (("{marlin}", "--compare", "no/such/model"), 1, "'no/such/model' is neither"),
        (("{marlin}", "--compare", "."), 1, "has no config.json"),
        (("{marlin}", "--compare", "{marlin}"), 1, "--compare is the checkpoint itself"),
        (("{marlin}", "--chat"), 1, "marlin has no chat template"),
        (
            ("{marlin}", "--prompt", "x", "--max-new-tokens", "2048"),
            1,
            "holds 2048 tokens, not 1 of the prompt",
        ),
        (("{marlin}", "--prompt", ""), 2, "--prompt is empty"),
        (("{marlin}", "--chat", "--prompt", "x"), 2, "--chat goes with neither"),
        (("{marlin}", "--chat", "--json"), 2, "--chat goes with neither"),
        (("{marlin}", "--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("{marlin}", "--device", "gpu"), 2, "--device"),
        (("{marlin}", "--revision", "main"), 1, "--revision is for models on the Hub"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    words, status, said, quantized, tmp_path, monkeypatch, cli
):
    monkeypatch.chdir(tmp_path)
    result = cli("generate", *(word.format(marlin=quantized("marlin")) for word in words))
    assert result.exit_code == status
    assert said in result.stderr and "loading marlin" not in result.stderr
    assert result.stdout == ""


def test_a_model_without_a_tokenizer(quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("marlin"), tmp_path / "mute")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    for words in ((directory,), (quantized("marlin"), "--compare", directory)):
        result = cli("generate", *words)
        assert result.exit_code == 1
        assert "mute has no tokenizer that can be read" in result.stderr and "Hint: " in result.stderr


@pytest.mark.parametrize("number", [0, -1, 1.5, "8", True])
def test_how_many_tokens_is_a_number(number, quantized):
    with pytest.raises(ConvertError, match="--max-new-tokens must be a number of at least 1"):
        marlin_convert.generate(quantized("marlin"), max_new_tokens=number)


def test_a_conversation_needs_a_template(quantized):
    with pytest.raises(ConvertError, match="no chat template"):
        marlin_convert.generate(quantized("marlin"), [{"role": "user", "content": "hello"}])


def test_what_transformers_does_not_load_is_an_error_that_says_so(quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("marlin"), tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 1024}))
    result = cli("generate", directory)
    assert result.exit_code == 1
    assert re.search(r"^Error: .*\(48, 512\).*\(64, 512\)", result.stderr, re.MULTILINE), result.stderr


def test_what_moves_the_cursor_is_escaped(capsys):
    from marlin_convert.cli.generate import show

    show("a\n\tb\x1b[2J")
    assert capsys.readouterr().out == "a\n\tb\\x1b[2J"
