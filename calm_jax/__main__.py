"""`python -m calm_jax` is `calm`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main()
