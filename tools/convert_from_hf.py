"""`python -m tools.convert_from_hf` is `calm convert`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("convert")
