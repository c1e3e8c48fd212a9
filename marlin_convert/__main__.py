"""`python -m marlin_convert` is `marlin-convert`."""

from marlin_convert.cli.main import main

main()
