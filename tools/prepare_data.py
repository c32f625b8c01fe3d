"""`python -m tools.prepare_data` is `calm prepare`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("prepare")
