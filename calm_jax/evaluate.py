"""`python -m calm_jax.evaluate` is `calm evaluate`: a trained model, measured by a task on a data set."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("evaluate")
