"""Prompts for a server: random ones of a length, drawn by a seed, or the lines of a file."""

import random
import textwrap
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from marlin_convert.errors import ConvertError, SourceError, reading

# Short words, of which a tokenizer mostly makes one token each.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city name team minute idea body "
    "back parent face level office door health person art war history party result change morning reason"
)

# Tokens of the vocabulary that prompts are drawn from.
DRAWN = 4096
# A text of random tokens is not read back as these tokens; it is mended until their number is right.
ATTEMPTS = 50


@dataclass(frozen=True)
class Prompts:
    """Texts, how many tokens each is thought to have, where they come from, and whose tokens they are."""

    texts: list[str]
    tokens: list[int]
    source: str
    tokenizer: str | None = None


def random_prompts(tokenizer: Any, name: str, number: int, length: int, seed: int) -> Prompts:
    """Texts that the tokenizer `name` reads as `length` random tokens, its special ones included."""
    draw = random.Random(seed)
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()))
    drawn = draw.sample(plain, min(DRAWN, len(plain)))
    # a token that is a part of a character is no text by itself
    vocabulary = [one for one in drawn if "\ufffd" not in tokenizer.decode([one])]
    special = len(tokenizer("")["input_ids"])
    texts, tokens = [], []
    for _ in range(number):
        text, count = _random_text(tokenizer, vocabulary, max(1, length - special), draw)
        texts.append(text)
        tokens.append(count + special)
    return Prompts(texts, tokens, f"random tokens of the tokenizer of {name}", name)


def _random_text(tokenizer: Any, vocabulary: list[int], length: int, draw: random.Random) -> tuple[str, int]:
    ids: list[int] = []
    text = ""
    for _ in range(ATTEMPTS):
        ids = ids[:length] + draw.choices(vocabulary, k=max(0, length - len(ids)))
        text = tokenizer.decode(ids)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) == length:
            break
    return text, len(ids)


def random_words(number: int, length: int, seed: int) -> Prompts:
    """Texts of `length` random English words, for want of a tokenizer."""
    draw, words = random.Random(seed), WORDS.split()
    texts = [" ".join(draw.choices(words, k=length)) for _ in range(number)]
    return Prompts(texts, [length] * number, "random words, each taken for a token")


def lines_of(path: Path, number: int) -> Prompts:
    """The lines of a file, over and over if there are too few; ConvertError if there is none."""
    try:
        with reading(path):
            lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SourceError(f"'{path}' is not UTF-8 text.", "--prompts takes text, a prompt a line.") from error
    if not lines:
        raise ConvertError(f"'{path}' has no line with a prompt.", "--prompts takes text, a prompt a line.")
    texts = list(islice(cycle(lines), number))
    again = f", {len(lines)} of them over and over" if len(lines) < number else ""
    return Prompts(texts, [len(text.split()) for text in texts], f"lines of {path.name}{again}")


def load_tokenizer(name: str, *, local: bool = False) -> Any:
    """The tokenizer of a directory or a Hub id; SourceError if there is none that can be read.

    With `local` the Hub is not asked: the name may be anything that a server calls its model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # an empty one, made from no files
            raise ValueError("it knows no words")
        return tokenizer
    except Exception as error:  # the tokenizers library raises that class itself
        raise SourceError(
            f"{name} has no tokenizer that can be read: {textwrap.shorten(str(error), 120)}",
            "--tokenizer takes a directory or a Hub id.",
        ) from error
