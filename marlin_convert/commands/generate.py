"""The story of `generate`: text from a checkpoint through transformers, and from the original beside it.

Always the likeliest token, so that the same files give the same text, and two models can be compared. Where
the tokenizer has a chat template, prompts are what its user says; elsewhere they are text to go on with.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from marlin_convert.calibration import load_tokenizer
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import ConvertError, OptionError, SourceError
from marlin_convert.hub import Source, resolve
from marlin_convert.models.tree import module_tree
from marlin_convert.options import pick_device

log = logging.getLogger("marlin_convert")

PROMPT = "The three most important things about programming are"

# A conversation, as chat templates take it: {"role": "user" or "assistant", "content": text} each.
Messages = Sequence[dict[str, str]]
START: Messages = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Answer:
    """What one model said: the ids of `text`, and seconds from the prompt to the last of them."""

    model: str
    text: str
    tokens: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer in a second, for one sequence."""
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Generated:
    """What a checkpoint said, and what the model it was compared with said, if there was one."""

    answer: Answer
    compared: Answer | None = None

    @property
    def same_tokens(self) -> int | None:
        """With how many tokens both answers begin that are the same; None where nothing was compared."""
        if self.compared is None:
            return None
        pairs = zip(self.answer.tokens, self.compared.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def to_dict(self) -> dict[str, Any]:
        """Both as data."""
        return {
            "answers": [
                {
                    "model": one.model,
                    "text": one.text,
                    "tokens": len(one.tokens),
                    "seconds": round(one.seconds, 3),
                    "tokens_per_second": round(one.tokens_per_second, 2),
                }
                for one in (self.answer, self.compared)
                if one is not None
            ],
            "same_tokens": self.same_tokens,
        }


@dataclass(frozen=True)
class Job:
    """What is asked of `generate`: a checkpoint, and perhaps the model it is compared with."""

    checkpoint: Source
    compare: Source | None
    device: torch.device
    max_new_tokens: int
    trust_remote_code: bool = False


def make_job(
    checkpoint: str | Path,
    *,
    compare: str | Path | None,
    compare_revision: str | None,
    max_new_tokens: int,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Job:
    """What is asked of `generate` by its options; ConvertError for what they do not take."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens must be a number of at least 1, not {max_new_tokens!r}.")
    where = pick_device(device)
    source = resolve(str(checkpoint), revision, code=trust_remote_code)
    other = None if compare is None else resolve(str(compare), compare_revision, code=trust_remote_code)
    if other is not None and other.directory.samefile(source.directory):
        raise ConvertError(
            f"--compare is the checkpoint itself, '{source.name}': its answer would be the same.",
            "give the model that it was made from.",
        )
    return Job(source, other, where, max_new_tokens, trust_remote_code)


def generate(job: Job, prompt: str | Messages) -> Generated:
    """Let the checkpoint, and the model it is compared with, go on with a text or a conversation.

    ConvertError for what is no model or does not run in transformers, and for a prompt that it does not take.
    """
    return Generated(*(speaker.answer(prompt) for speaker in speakers(job, prompt)))


def speakers(job: Job, prompt: str | Messages | None) -> list["Speaker"]:
    """The checkpoint, and the model it is compared with, loaded: both are in memory at once.

    ConvertError if one of them cannot be loaded or, before that, for what is no model, has no tokenizer, or
    does not take the prompt; without one a conversation is to come, which takes a chat template.
    """
    sources = [job.checkpoint] if job.compare is None else [job.checkpoint, job.compare]
    found = [Speaker(source, job) for source in sources]
    for speaker in found:
        speaker.ids(START if prompt is None else prompt)
    for speaker in found:
        speaker.load()
    return found


class Speaker:
    """A model that answers, with its tokenizer; ConvertError for what is no model, or has no tokenizer."""

    def __init__(self, source: Source, job: Job):
        self.name = source.name
        self._source, self._job = source, job
        # as transformers builds it, without its weights
        self._model = module_tree(
            Weights(Checkpoint.open(source.directory)), trust_remote_code=job.trust_remote_code
        )
        self._tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)

    @property
    def chats(self) -> bool:
        """Whether prompts are put into a chat template."""
        return bool(self._tokenizer.chat_template)

    def load(self) -> None:
        """Have transformers load the weights, packed linears in our modules; ConvertError if it does not."""
        log.info("loading %s", self.name)
        with _explained(self.name):
            model = type(self._model).from_pretrained(
                self._source.directory, dtype="auto", trust_remote_code=self._job.trust_remote_code
            )
            self._model = model.to(self._job.device).eval()  # type: ignore[arg-type]
            # what is compiled, dequantized or allocated at the first product is in no figure
            self._generate(torch.zeros(1, 1, dtype=torch.long), 2)

    def answer(self, prompt: str | Messages, write: Callable[[str], None] | None = None) -> Answer:
        """Go on with a text or a conversation; ConvertError for one that the model does not take.

        `write` is called with every part of the answer as soon as it is there.
        """
        ids = self.ids(prompt)
        streamer = None if write is None else _Parts(self._tokenizer, write)
        started = time.perf_counter()
        try:
            tokens = self._generate(ids, self._job.max_new_tokens, streamer)
        except torch.OutOfMemoryError as error:
            raise _no_memory(self.name, error) from error
        seconds = time.perf_counter() - started
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(self.name, str(text), tuple(tokens), seconds)

    def ids(self, prompt: str | Messages) -> torch.Tensor:
        """The prompt as token ids (1, length) int64, in the chat template where there is one."""
        if not self.chats and not isinstance(prompt, str):
            raise ConvertError(
                f"{self.name} has no chat template.", "give text to go on with: --prompt TEXT."
            )
        found = self._in_template(prompt) if self.chats else self._tokenizer(prompt)["input_ids"]
        if not found:
            raise OptionError("--prompt is empty.")
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        most = self._job.max_new_tokens
        if isinstance(limit, int) and len(found) + most > limit:
            raise ConvertError(
                f"{self.name} holds {limit} tokens, not {len(found)} of the prompt and {most} more.",
                "give a shorter prompt, or a smaller --max-new-tokens.",
            )
        return torch.tensor([found])

    def _in_template(self, prompt: str | Messages) -> Any:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever a template, a program of the model's, does with a conversation
            raise ConvertError(
                f"the chat template of {self.name} does not take this: {type(error).__name__}: {error}",
                'a conversation is a list of {"role": "user" or "assistant", "content": text}.',
            ) from error

    def _generate(self, ids: torch.Tensor, most: int, streamer: TextStreamer | None = None) -> list[int]:
        ids = ids.to(self._job.device)
        with torch.inference_mode():
            answered = self._model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, streamer=streamer,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
            )  # fmt: skip
        return answered[0, ids.shape[1] :].tolist()


class _Parts(TextStreamer):
    """Hands on the words of an answer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a part that no later token changes."""
        self._write(text)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers does not do with a model into a ConvertError."""
    try:
        yield
    except ConvertError:
        raise
    except ImportError as error:
        raise SourceError(
            f"transformers needs more to load {name}: {_line(error)}.",
            "install that, or repack it for our own modules: marlin-convert quantize MODEL -o DIR.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise _no_memory(name, error) from error
    except Exception as error:  # whatever transformers does with a model it does not like
        raise SourceError(
            f"transformers cannot run {name}: {type(error).__name__}: {_line(error)}.",
            "'marlin-convert verify' says what is wrong with a checkpoint.",
        ) from error


def _no_memory(name: str, error: Exception) -> ConvertError:
    return ConvertError(f"the GPU's memory does not hold {name}: {_line(error)}.", "pass --device cpu.")


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
