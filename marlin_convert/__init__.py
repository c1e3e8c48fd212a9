"""marlin-convert: 4-bit MARLIN checkpoints from Hugging Face language models, checked."""

__version__ = "0.1.0"
