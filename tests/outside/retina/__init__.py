"""A package that is none of calm_jax: an encoder, a language model and a tokenizer, which its metadata offer."""
