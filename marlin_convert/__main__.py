"""`python -m marlin_convert` is `marlin-convert`."""

from marlin_convert.cli import main

main()
