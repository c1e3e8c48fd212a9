"""The engines' hooks: thin, one file per engine.

transformers looks for no plugins, so `import marlin_convert` has to be enough, and must stay as cheap as it
is. It leaves a finder on sys.meta_path that is asked for every import and answers for one, transformers'
table of quantizers: when that is loaded, ours is put into it. Nothing is imported before, and the order of
`import marlin_convert` and `import transformers` does not matter.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

log = logging.getLogger("marlin_convert")

_TABLE = "transformers.quantizers.auto"


class _TableFinder:
    """Finds transformers' table of quantizers, to be loaded with ours in it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _TABLE else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Have transformers know our quantizer: now if it is imported, else as soon as it is."""
    if _TABLE in sys.modules:
        _register()
    elif _TableFinder not in sys.meta_path:
        sys.meta_path.insert(0, _TableFinder)


def _register() -> None:
    try:
        # registers when it is imported: that may be going on already, and have brought us here
        import_module("marlin_convert.integrations.transformers")
    except Exception as error:
        _does_not_fit("transformers", "5.17.0 and 5.23.0", error)


def plug_into_vllm() -> None:
    """The entry point of vLLM's group of general plugins, called in each of its processes."""
    try:
        from marlin_convert.integrations import vllm

        vllm.register()
    except Exception as error:
        _does_not_fit("vLLM", "0.32.0", error)


def _does_not_fit(engine: str, tried: str, error: Exception) -> None:
    """Say so and let the engine go on: it may be there for another model."""
    log.warning(
        "marlin-convert does not fit this %s, which loads no marlin checkpoints now; tried with %s. %s: %s",
        engine,
        tried,
        type(error).__name__,
        error,
    )
