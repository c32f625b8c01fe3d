"""`python -m tools.export_to_hf` is `calm export`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("export")
