from marlin_convert.cli import main

main()
