"""`python -m tools.check_parity` is `calm parity`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("parity")
