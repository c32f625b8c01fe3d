"""`python -m tools.plan` is `calm plan`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("plan")
