"""`python -m tools.demo` is `calm demo`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("demo")
