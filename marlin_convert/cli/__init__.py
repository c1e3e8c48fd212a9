"""The command line, a file a verb: parse, call one function, print. Heavy packages are imported inside."""
