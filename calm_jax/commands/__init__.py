"""What each command of `calm` does, one file a command. `calm_jax.cli` declares their options and help."""
