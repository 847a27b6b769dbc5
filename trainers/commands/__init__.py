"""The command line: programs by name, parsers that name the nearest option, one line for a user's mistake."""
