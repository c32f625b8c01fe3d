"""Weights of Hugging Face models in, leaves of the JAX models out, and back."""
