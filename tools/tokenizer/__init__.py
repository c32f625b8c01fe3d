"""The small tokenizer that ships, trained: `python -m tools.tokenizer`."""
