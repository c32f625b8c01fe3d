"""Does CALM learn what the paper claims, at a scale that two cores can train? `python -m tools.study --help`."""
