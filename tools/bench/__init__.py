"""How fast it is, beside torch in the same run: `python -m tools.bench`, and on one GPU `python -m tools.bench.gpu`."""
