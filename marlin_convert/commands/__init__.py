"""What each command does, a story a file, readable from top to bottom; `cli` has the options of each."""
