"""What comes of a check: it passes, fails, or says why it could not run."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from marlin_convert.checks.subject import Subject
from marlin_convert.errors import ConvertError

log = logging.getLogger("marlin_convert")

S = TypeVar("S", bound=Subject | None)
P = ParamSpec("P")


@dataclass(frozen=True)
class Check:
    """What came of a check: pass, fail or skipped, and why."""

    status: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


class CannotRun(Exception):
    """What a check needs and is not there, in words for its reason."""


def reporting(
    check: Callable[Concatenate[list[str], S, P], Check],
) -> Callable[Concatenate[S, P], Check]:
    """The check, given a list for its problems: what it has put there is reported whatever stops it.

    Stopped before it has found any it is skipped, and said to have `stopped` where that was no CannotRun.
    What stops one of several ranks, and is nothing that all find in a checkpoint, comes out: it ends all.
    """

    @wraps(check)
    def run(subject: S, *args: P.args, **kwargs: P.kwargs) -> Check:
        problems: list[str] = []
        try:
            return check(problems, subject, *args, **kwargs)
        except CannotRun as reason:
            found = Check("skipped", str(reason))
        except Exception as error:
            if subject is not None and not (subject.ranks.alone or isinstance(error, ConvertError)):
                raise
            if not isinstance(error, ConvertError | torch.OutOfMemoryError):
                log.error("the check was stopped by a bug", exc_info=error)
            said = str(error) if isinstance(error, ConvertError) else f"{type(error).__name__}: {error}"
            found = Check("skipped", f"it stopped: {said.removesuffix('.')}", {"stopped": True})
        return verdict([*problems, f"not finished: {found.reason}"], "") if problems else found

    return run


def verdict(problems: list[str], summary: str, **details: Any) -> Check:
    """Passed where there are no problems, else failed by the first of them; all stand in the details."""
    if not problems:
        return Check("pass", summary, details)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check("fail", problems[0] + more, {"problems": problems, **details})


def json_number(value: Any) -> Any:
    """Six digits of a float, None where JSON has no number for it; a list for a tuple of them."""
    if isinstance(value, tuple):
        return [json_number(one) for one in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def json_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same under every name."""
    return {name: json_number(value) for name, value in values.items()}
