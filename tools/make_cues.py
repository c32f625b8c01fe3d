"""`python -m tools.make_cues` is `calm cues`."""

from calm_jax.cli import main

if __name__ == "__main__":
    main("cues")
