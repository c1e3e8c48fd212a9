"""marlin-convert: 4-bit MARLIN checkpoints from Hugging Face language models, checked.

    import marlin_convert

    made = marlin_convert.quantize("Qwen/Qwen3-0.6B", "qwen3-marlin")
    marlin_convert.verify("qwen3-marlin", source="Qwen/Qwen3-0.6B").passed

Importing it imports nothing heavy. It also lets transformers load what is in the `marlin` layouts.
"""

from typing import TYPE_CHECKING, Any

from marlin_convert.errors import ConvertError
from marlin_convert.integrations import announce

if TYPE_CHECKING:
    from marlin_convert.api import Result, generate, inspect, push, quantize, sparsify, verify

__version__ = "0.1.0"
__all__ = ["ConvertError", "Result", "generate", "inspect", "push", "quantize", "sparsify", "verify"]

announce()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from marlin_convert import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
