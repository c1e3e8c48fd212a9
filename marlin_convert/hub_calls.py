"""Calls of the Hub's client: a signal ends them, and what goes wrong is a sentence with a hint."""

import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from marlin_convert.errors import SourceError, printable

T = TypeVar("T")


def aside(call: Callable[[], T]) -> T:
    """Make a call that may take hours in a thread of its own, so that a signal is heard at once.

    The client's own threads end when what they are at is done; nobody has to wait for them.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        # a wait without an end does not hear a signal that came just before it began
        thread.join(0.2)
    return done.result()


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into a SourceError with a sentence and a hint.

    Only calls of the client stand inside: what it cannot understand of an answer is an error of Python's.
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

    said = hub_sentence(error)
    match error:
        case errors.GatedRepoError():
            return (
                f"{repository!r} is gated and this token has no access{said}.",
                "request access on its page, then run 'hf auth login'.",
            )
        case errors.RepositoryNotFoundError():
            return (
                f"there is no directory and no Hub repository {repository!r} that you can see{said}.",
                "check the spelling; for a private one run 'hf auth login' or set HF_TOKEN.",
            )
        case errors.RevisionNotFoundError():
            return (
                f"{repository!r} has no such revision{said}.",
                "--revision takes a branch, a tag or a commit.",
            )
        case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError() as answer):
            sentence, hint = _answered(repository, answer)
            return (f"{repository!r} is not in the local cache, and {sentence}", hint)
        case errors.LocalEntryNotFoundError():
            return (
                f"{repository!r} is not in the local cache and the Hub did not give it.",
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
            )
        case errors.OfflineModeIsEnabled():
            return (
                f"{repository!r} is not in the local cache, and HF_HUB_OFFLINE forbids to ask the Hub.",
                "unset HF_HUB_OFFLINE.",
            )
        case errors.HFValidationError():
            return (f"{repository!r} is neither there nor a Hub id.", "a Hub id looks like 'org/name'.")
        case errors.EntryNotFoundError():
            return (f"{repository!r} has no such file{said}.", "check its name and --revision.")
        case errors.DisabledRepoError():
            return (f"the Hub has disabled {repository!r}{said}.", "its page may say why.")
        case errors.HfHubHTTPError() | httpx.HTTPStatusError():
            return _answered(repository, error)
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
        case UnicodeEncodeError():
            return (
                f"the Hub was not asked about {repository!r}: the token has characters that no token has.",
                "set HF_TOKEN to the token as its page shows it, or run 'hf auth login'.",
            )
        case ValueError() | KeyError() | TypeError() | AttributeError():
            return (
                f"the Hub gave an answer about {repository!r} that is no answer ({type(error).__name__}).",
                "check HF_ENDPOINT, and run the same command again.",
            )
    return None


def _answered(repository: str, error: Any) -> tuple[str, str]:
    """The sentence and the hint for a status that nothing more is known of."""
    status = error.response.status_code if error.response is not None else 0
    hint = _HINTS.get(status, _BROKEN_HINT if status == 0 or status >= 500 else _REFUSED_HINT)
    return f"the Hub answered {status or 'nothing'} for {repository!r}{hub_sentence(error)}.", hint


def hub_sentence(error: BaseException | None) -> str:
    """What the Hub itself says of an error: a line behind a colon, without the token; "" if it is silent."""
    from huggingface_hub import get_token

    response = getattr(error, "response", None)
    said = getattr(error, "server_message", None) or ""
    if not said and response is not None:
        said = response.headers.get("X-Error-Message", "")
    if token := get_token():
        said = said.replace(token, "***")
    line = printable(textwrap.shorten(said, 300, placeholder=" ...")).rstrip(".")
    return f": {line}" if line else ""


_BROKEN_HINT = "the Hub has a fault: run the same command again later."
_REFUSED_HINT = "mend what the Hub says, or check HF_ENDPOINT, and run the same command again."
_HINTS = {
    401: "the token is not accepted: run 'hf auth login', or set HF_TOKEN.",
    402: "see to the plan of the account that the repository belongs to.",
    403: "if the token may not do that, make one that may at huggingface.co/settings/tokens; to push, it "
    "needs write access.",
    413: "what was sent is more than the Hub takes: a smaller --max-shard-size makes smaller files.",
    409: "somebody else is at work on it: run the same command again.",
    412: "somebody else has pushed to it meanwhile: run the same command again.",
    429: "too many requests: wait some minutes, then run the same command again.",
}
