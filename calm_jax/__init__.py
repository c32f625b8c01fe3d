"""calm_jax: a photograph and an instruction in; a score, a comment or an answer about it out."""

__version__ = "0.1.0"
