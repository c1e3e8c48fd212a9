"""The checks of `verify`, a file each: what is right about a checkpoint, and what is not."""

# In the order they are made.
CHECKS = ("files", "layout", "sparsity", "numbers", "kernel", "generate")
# Those that nobody has to ask for: the last needs the memory of the whole model.
BY_DEFAULT = CHECKS[:-1]
