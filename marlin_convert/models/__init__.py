"""What we know of architectures, and running a model one decoder block at a time."""
