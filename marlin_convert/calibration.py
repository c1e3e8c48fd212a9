"""Text to token ids, deterministically: what a model is calibrated on, and what it is tested on."""

import hashlib
import importlib.util
import logging
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from marlin_convert.documents import BUILTIN, Document, documents
from marlin_convert.errors import ConvertError, SourceError, readable
from marlin_convert.hub import Source

log = logging.getLogger("marlin_convert")

# What two readings of one vocabulary differ on: runs of spaces, digits, line ends, letters beyond ASCII.
PROBE = "def f(x):\n    return x + 12345  # na\u00efve caf\u00e9,\t\u4e2d\u6587 \u2014 it's\r\n\n  the end"

# Files of a sentencepiece vocabulary.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class TuningText:
    """Token ids (windows, length) int64 to tune on and, apart from them, to judge by what came of it."""

    ids: Tensor
    held_out: Tensor

    @property
    def digest(self) -> str:
        """The sha256 of all ids."""
        return hashlib.sha256(torch.cat((self.ids, self.held_out)).numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """Token ids (samples, length) int64, with the sha256 of those ids as their identity.

    `tuning` is what to tune on afterwards, if that is to be done.
    """

    ids: Tensor
    source: str
    tuning: TuningText | None = None

    @property
    def digest(self) -> str:
        """The sha256 of the ids."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights, of the ids that tokenizer.json gives where there is one.

    SourceError if there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # an empty one, made from no files
            raise ValueError("it knows no words")
        return _as_in_file(tokenizer, source)
    except ConvertError:
        raise
    except UnicodeEncodeError as error:  # of the path
        raise SourceError(
            f"the tokenizer of {source.name} cannot be read: its path is no UTF-8 text.",
            "rename the directory or, if the locale of this machine is at fault, set PYTHONUTF8=1.",
        ) from error
    except Exception as error:  # the tokenizers library raises that class itself
        _check_packages(source)
        raise SourceError(
            f"{source.name} has no tokenizer that can be read: {textwrap.shorten(str(error), 120)}",
            "text needs one beside the weights.",
        ) from error


def _as_in_file(tokenizer: PreTrainedTokenizerBase, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer or, where its class splits text otherwise than tokenizer.json, that of the file.

    tokenizer_config.json names the class. A wrong one drops the spaces of a byte-level vocabulary in some
    versions of transformers; the model was trained on what the file says.
    """
    path = source.directory / "tokenizer.json"
    if not path.is_file():
        return tokenizer
    in_file = Tokenizer.from_file(str(path))
    in_file.no_truncation()
    in_file.no_padding()
    expected = in_file.encode(PROBE, add_special_tokens=False).ids
    found = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if found == expected:
        return tokenizer
    log.warning(
        "transformers %s as %s splits text otherwise than tokenizer.json (%d tokens, not %d, of a line of %d "
        "characters%s); tokenizer.json's ids are taken: engines that go by the class feed the model others",
        transformers.__version__, type(tokenizer).__name__, len(found), len(expected), len(PROBE),
        "" if tokenizer.decode(found) == PROBE else ", and some are lost",
    )  # fmt: skip
    plain = PreTrainedTokenizerFast.from_pretrained(source.directory)
    if plain(PROBE, add_special_tokens=False)["input_ids"] != expected:
        raise SourceError(
            f"transformers gives other ids than the tokenizer.json of {source.name}, whatever its class.",
            "its files may not be of one tokenizer; fetch the model again.",
        )
    return plain


def _check_packages(source: Source) -> None:
    """SourceError when the only vocabulary is in sentencepiece's format and what reads that is missing."""
    found = [name for name in SENTENCEPIECE if (source.directory / name).exists()]
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [package for package, module in modules.items() if not _installed(module)]
    if found and missing and not (source.directory / "tokenizer.json").exists():
        raise SourceError(
            f"the {found[0]} of {source.name} is in sentencepiece's format, for which a package is missing.",
            f"pip install {' '.join(missing)}.",
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def calibrate(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    held_out: bool = False,
) -> Calibration:
    """`samples` windows of `length` tokens of a text; ConvertError with the counts if it is too short.

    source: 'builtin', a .txt, .jsonl or .parquet file, or 'hf:DATASET[:SPLIT]'. Documents are joined in an
    order drawn by the seed until there are enough tokens; of these the windows are drawn by the seed.
    `held_out` takes the part of the builtin text that calibration never sees.
    """
    ids = _tokens(tokenizer, source, seed, held_out, samples * length)
    windows = len(ids) // length
    if windows < samples:
        raise ConvertError(
            f"calibration text {shown(source)} has {len(ids)} tokens; {samples} samples of {length} need "
            f"{samples * length}.",
            f"pass --samples {windows}, a smaller --sequence-length, or more text."
            if windows
            else "pass a smaller --sequence-length, or more text.",
        )
    chosen = _drawn(windows, samples, seed)
    return Calibration(_windows(ids, chosen, length), shown(source))


def tuning_text(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    tokens: int,
    held_out: int,
) -> TuningText:
    """What `calibrate` draws of a text, and as much beyond it as there is: about `tokens` in all to tune on.

    About `held_out` tokens more, at most an eighth of the text, are to judge by: windows that were not drawn,
    as long as there are any. ConvertError for a text of one window.
    """
    calibrated = len(_tokens(tokenizer, source, seed, False, samples * length)) // length
    drawn = _drawn(calibrated, samples, seed)
    ids = _tokens(tokenizer, source, seed, False, max(samples * length, tokens) + held_out)
    windows = len(ids) // length
    if windows < 2:
        raise ConvertError(
            f"calibration text {shown(source)} has one window of {length} tokens: none is left to judge by.",
            "pass a smaller --sequence-length, or more text.",
        )
    order = [*drawn, *sorted(set(range(windows)) - set(drawn))]
    judging = max(1, min(held_out // length, windows // 8))
    tuning = min(len(order) - judging, max(samples, tokens // length))
    return TuningText(
        _windows(ids, order[:tuning], length), _windows(ids, order[len(order) - judging :], length)
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, source: str, seed: int, held_out: bool, enough: int
) -> list[int]:
    """The tokens of a text's documents, joined in an order drawn by the seed until there are enough."""
    ids: list[int] = []
    for document in documents(source, seed, held_out=held_out):
        ids += _tokenize(tokenizer, document)
        if len(ids) >= enough:
            break
    return ids


def _drawn(windows: int, samples: int, seed: int) -> list[int]:
    """The windows that are calibrated on."""
    return sorted(random.Random(seed).sample(range(windows), samples))


def _windows(ids: list[int], chosen: list[int], length: int) -> Tensor:
    """Some windows of a text as rows, (windows, length) int64."""
    return torch.tensor([ids[at * length : (at + 1) * length] for at in chosen], dtype=torch.int64)


def _tokenize(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    if isinstance(document, list):
        try:
            document = str(tokenizer.apply_chat_template(document, tokenize=False))
        except Exception as error:  # the template is a program of the model's, it may raise anything
            raise SourceError(
                f"the model's chat template does not take these messages: {error}",
                'give the text itself, as {"text": "..."}.',
            ) from error
        return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        return tokenizer(document, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises that class itself
        raise SourceError(
            f"the model's tokenizer does not take this text: {error}", "its files may be damaged."
        ) from error


def shown(source: str) -> str:
    """How a source is named in output: never with a local path."""
    return source if source == BUILTIN or source.startswith("hf:") else readable(Path(source).name)
