"""Heavy packages, imported in less time."""

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("marlin_convert")


@contextmanager
def imports() -> Iterator[None]:
    """Import without looking for garbage: all of it stays, and the search takes a quarter of the time.

    OpenMP reads its settings then: its threads shall sleep and not spin while there is nothing for them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log.info("loading torch and transformers")
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
