"""What becomes of one linear."""

from dataclasses import dataclass
from types import ModuleType

from marlin_convert import formats


@dataclass(frozen=True)
class Fate:
    """What becomes of one linear of shape (k, n).

    `format` is what it is written in, None if it is written dense; `sparse` says that it is 2:4; `reason` why
    it is left as it is, or not 2:4 while others are.
    """

    linear: str
    k: int
    n: int
    format: str | None
    sparse: bool = False
    reason: str | None = None

    @property
    def packed(self) -> bool:
        """Whether the linear is written as integer codes."""
        return self.format is not None

    @property
    def pruned(self) -> bool:
        """Whether the linear is written dense, but pruned."""
        return self.format is None and self.sparse

    @property
    def layout(self) -> ModuleType:
        """The module of its format."""
        assert self.format is not None
        return formats.FORMATS[self.format]
