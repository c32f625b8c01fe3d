"""`python -m calm_jax.train` is `calm train`: the processes of a recipe, trained in their order."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("train")
