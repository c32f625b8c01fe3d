"""`python -m tools.show_samples` is `calm samples`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("samples")
