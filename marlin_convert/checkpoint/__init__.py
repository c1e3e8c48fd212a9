"""Hugging Face directories: read lazily and validated, written atomically, checked against a manifest."""
