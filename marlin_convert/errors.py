"""The one family of errors a user can cause; anything else is a bug and shows its traceback."""


class ConvertError(Exception):
    """Something could not be done: what and where, with the numbers; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class SourceError(ConvertError):
    """The model or checkpoint given cannot be read, or is not valid."""


class FormatError(ConvertError):
    """An on-disk format cannot hold this layer, or does not say this."""
