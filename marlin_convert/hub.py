"""A model by name: a local directory, or a repository of the Hugging Face Hub and the commit it came from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from marlin_convert.checkpoint.reader import json_file
from marlin_convert.errors import SourceError
from marlin_convert.models.architectures import architecture_of

_PART = r"(?![.-])[\w.-]{1,96}(?<![.-])"
_REPOSITORY = re.compile(f"({_PART}/)?{_PART}", re.ASCII)

# What a conversion and `verify` read: never pickles, and code only if it was asked for.
_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model*",
    "*.tiktoken",
    "README.md",
    "recipe*.yaml",
    # in any case, which the patterns of the client tell apart
    *("".join(f"[{x.upper()}{x}]" if x.isalpha() else x for x in word) + "*"
      for word in ("license", "notice", "use_policy")),
]  # fmt: skip
# Second copies of the weights that some repositories carry.
_NOT = ["consolidated*", "*/*.safetensors", "original/*", "onnx/*"]


@dataclass(frozen=True)
class Source:
    """A resolved model: where its files are, what it is called, and its commit (None for a directory)."""

    directory: Path
    name: str
    commit: str | None


def resolve(model: str, revision: str | None = None, *, code: bool = False) -> Source:
    """The directory of MODEL, downloading it if it is a Hub id; SourceError says why it cannot be had.

    A path that exists wins over a Hub id. `code` also fetches the Python files of the repository.
    """
    path = Path(model)
    if model and path.is_dir():
        if revision is not None:
            raise SourceError(
                f"'{model}' is a directory; --revision is for models on the Hub.", "leave --revision out."
            )
        return Source(path, path.resolve().name, None)
    if not model or path.exists() or not is_hub_id(model):
        raise SourceError(
            f"'{model}' is neither a directory nor a Hub id.", "a Hub id looks like 'org/name'."
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    with hub_errors(model):
        # the architecture first: a model that is refused is not worth its gigabytes
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        architecture_of(json_file(config.parent, config.name))
        patterns = _FILES + (["*.py"] if code else [])
        directory = Path(
            snapshot_download(
                model, revision=config.parent.name, allow_patterns=patterns, ignore_patterns=_NOT
            )
        )
    return Source(directory, model, directory.name)


def remote_files(source: Source) -> set[str]:
    """The names of all files of a Hub model at its commit; SourceError if the Hub does not say."""
    from huggingface_hub import HfApi

    with hub_errors(source.name):
        return set(HfApi().list_repo_files(source.name, revision=source.commit))


def fetch(source: Source, name: str) -> None:
    """Have one more file of a Hub model beside the others; SourceError says why it cannot be had."""
    from huggingface_hub import hf_hub_download

    with hub_errors(source.name):
        hf_hub_download(source.name, name, revision=source.commit)


def is_hub_id(name: object) -> bool:
    """Whether `name` could be a model on the Hub: namespace/name, or name alone for the oldest ones."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a repository one can push to: namespace/name."""
    return "/" in name and is_hub_id(name)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into a SourceError with a sentence and a hint.

    Only calls of the client stand inside: what it cannot understand of an answer is a ValueError or KeyError.
    """
    try:
        yield
    except Exception as error:
        # what breaks an upload comes wrapped
        wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
        said = _said(repository, error.__cause__ if wrapped else error)
        if said is None:
            raise
        raise SourceError(*said) from error


def _said(repository: str, error: BaseException | None) -> tuple[str, str] | None:
    """The sentence and the hint for an error of the Hub's client, None for one that is not."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    match error:
        case errors.GatedRepoError():
            return (
                f"{repository!r} is gated and this token has no access.",
                "request access on its page, then run 'hf auth login'.",
            )
        case errors.RepositoryNotFoundError():
            return (
                f"there is no directory and no Hub repository {repository!r} that you can see.",
                "check the spelling; for a private one run 'hf auth login' or set HF_TOKEN.",
            )
        case errors.RevisionNotFoundError():
            return (
                f"{repository!r} has no such revision.",
                "--revision takes a branch, a tag or a commit.",
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"{repository!r} is not in the local cache and the Hub did not give it.",
                "check the network and HF_HUB_OFFLINE.",
            )
        case errors.OfflineModeIsEnabled():
            return (
                f"{repository!r} is not in the local cache, and HF_HUB_OFFLINE forbids to ask the Hub.",
                "unset HF_HUB_OFFLINE.",
            )
        case errors.HFValidationError():
            return (f"{repository!r} is neither there nor a Hub id.", "a Hub id looks like 'org/name'.")
        case errors.HfHubHTTPError() | httpx.HTTPStatusError():
            status = error.response.status_code if error.response is not None else None
            hint = _HINTS.get(status or 0, "try again later; what is uploaded already stays there.")
            return (f"the Hub answered {status or 'nothing'} for {repository!r}.", hint)
        case httpx.HTTPError() | ConnectionError() | TimeoutError():
            return (
                f"the connection to the Hub broke, about {repository!r} ({type(error).__name__}).",
                "check the network and HF_ENDPOINT, and run the same command again.",
            )
        case OSError():
            return (
                f"a file cannot be read or written: {error.strerror} ('{error.filename}').",
                "mend that, and run the same command again.",
            )
        case ValueError() | KeyError() | TypeError():
            return (
                f"the Hub gave an answer about {repository!r} that is no answer ({type(error).__name__}).",
                "check HF_ENDPOINT, and run the same command again.",
            )
    return None


_HINTS = {
    401: "the token is not accepted: run 'hf auth login', or set HF_TOKEN.",
    403: "the token may not do that: make one with write access at huggingface.co/settings/tokens.",
    409: "somebody else is at work on it: run the same command again.",
    412: "somebody else has pushed to it meanwhile: run the same command again.",
    429: "too many requests: wait some minutes, then run the same command again.",
}
