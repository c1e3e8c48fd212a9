"""Finding what a model is made of, and running a model one decoder block at a time."""
