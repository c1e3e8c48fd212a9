"""What transformers makes of the directory: greedy tokens, and how likely they are by our own reading."""

import torch
from torch import nn

from marlin_convert.checks.divergence import log_probabilities
from marlin_convert.checks.outcome import Check, json_number, reporting, verdict
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import ConvertError
from marlin_convert.models.blocks import BlockModel

# Sequences of random tokens, their length, and how many tokens transformers adds to each.
PROMPTS, PROMPT, ANSWER = 2, 32, 16

# Nats between 16 bits there and float32 here; rounding takes 0.014 of it in float16, 0.04 in bfloat16.
GENERATE_DIFFERENCE = 0.1


@reporting
def check(problems: list[str], subject: Subject) -> Check:
    """Load the directory by transformers alone, let it go on with random prompts, and weigh its tokens."""
    directory = subject.weights.checkpoint.directory
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        subject.model.config.get_text_config().vocab_size, (PROMPTS, PROMPT), generator=draw
    )
    try:
        loaded: nn.Module = type(subject.model).from_pretrained(
            directory, dtype="auto", trust_remote_code=subject.trust_remote_code
        )
    except ImportError as error:
        return Check("skipped", f"transformers needs more for this layout: {_first_line(error)}")
    except Exception as error:  # whatever transformers does with a directory it does not like
        said = f"{type(error).__name__}: {_first_line(error)}"
        return verdict([f"transformers cannot load it: {said}"], "")
    loaded = loaded.to(subject.device).eval()
    ids = prompts.to(subject.device)
    try:
        with torch.inference_mode():
            answered = loaded.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER,
                do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    except (ConvertError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        return verdict([f"transformers cannot run it: {type(error).__name__}: {_first_line(error)}"], "")
    del loaded
    found = torch.stack(answered.logits, 1).float().log_softmax(-1).cpu()
    sequences = answered.sequences.cpu()
    expected = log_probabilities(
        BlockModel(subject.weights, subject.device, fast=False, trust_remote_code=subject.trust_remote_code),
        sequences,
    )[:, PROMPT - 1 : -1]
    tokens = sequences[:, PROMPT:, None]
    chosen = expected.gather(-1, tokens)[..., 0]
    difference = (found.gather(-1, tokens)[..., 0] - chosen).abs().max().item()
    margin = (expected.amax(-1) - chosen).max().item()
    if not difference <= GENERATE_DIFFERENCE:
        problems.append(
            f"a token of transformers is {difference:.2g} nats from its likelihood here; at most "
            f"{GENERATE_DIFFERENCE}"
        )
    if not margin <= GENERATE_DIFFERENCE:
        problems.append(
            f"a greedy token of transformers is {margin:.2g} nats less likely than the best; at most "
            f"{GENERATE_DIFFERENCE}"
        )
    summary = f"{tokens.numel()} greedy tokens by transformers, within {max(difference, margin):.1e} nats"
    return verdict(problems, summary, difference=json_number(difference), margin=json_number(margin))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
