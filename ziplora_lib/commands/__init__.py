"""Commands of the command line that are too long for __main__.py, which has the parser of all of them."""
