"""marlin-convert: 4-bit MARLIN checkpoints from Hugging Face language models, checked."""

from marlin_convert.integrations import announce

__version__ = "0.1.0"

announce()
