"""`python -m calm_jax.predict` is `calm`."""

from calm_jax.predict.program import cli

if __name__ == "__main__":
    cli()
