"""Packed rows of pictures and conversations in, hidden states at every position out: the whole of CALM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from calm_jax import config as config_lib
from calm_jax.models import lora
from calm_jax.models.encoders import Feature
from calm_jax.models.light_head import LightHead, phrase_embeddings
from calm_jax.models.mfam import Mfam
from calm_jax.models.score_head import ScoreHead


class Calm(nnx.Module):
    """Visual encoder, MFAM and language model. Parameters are float32 until the training state casts them."""

    def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
        self.cfg = cfg  # frozen, so that the graphdef can be hashed
        self.remat = cfg.remat
        self.encoder = cfg.encoder.build(cfg.depths, rngs)
        self.mfam = Mfam(cfg, rngs)
        self.decoder = cfg.decoder.build(rngs)
        if cfg.lora.rank:
            lora.add(self, cfg.lora, rngs)
        # Last, so that the other parameters are drawn alike with them and without.
        self.score_head = ScoreHead(cfg.decoder.width, cfg.score_head, rngs) if cfg.score_head.width else None
        self.light_head = LightHead(cfg.decoder.width, cfg.light_head, rngs) if cfg.light_head.grades else None

    def encode(self, images: UInt8[Array, "B I H W 3"], parts: tuple[str, ...], *, dtype: Any,
               freeze_encoder: bool = False) -> Float[Array, "B M D"]:
        """Visual tokens of a row's images, one image after the other, each in the order of `parts`: M = I * N.

        Args:
          images: RGB, 0..255.
          parts: subset of low, middle, high, thematic, in that order; the others are not computed.
          freeze_encoder: no gradient is wanted for the encoder, so its activations need not be kept.
        """
        rows = images.shape[0]
        features = self.encoder.features(rearrange(images, "b i h w c -> (b i) h w c"), parts, dtype=dtype,
                                         remat=self.remat)
        if freeze_encoder:
            features = {part: seen._replace(tokens=jax.lax.stop_gradient(seen.tokens))
                        for part, seen in features.items()}
        tokens = self.mfam(features, remat=self.remat)
        return rearrange(tokens, "(b i) n d -> b (i n) d", b=rows)

    def look(self, batch: dict[str, Array], parts: tuple[str, ...], *, dtype: Any,
             freeze_encoder: bool = False) -> Float[Array, "B M D"]:
        """Visual tokens of a batch: those that it brings as `pool`, else those of its `features/PART`
        (`[B, I, S, E]`), which a frozen encoder has seen before, else those of its `images`; as `encode`."""
        if "pool" in batch:
            return batch["pool"].astype(dtype)
        if f"features/{parts[0]}" not in batch:
            return self.encode(batch["images"], parts, dtype=dtype, freeze_encoder=freeze_encoder)
        rows = batch["tokens"].shape[0]
        features = {part: Feature(rearrange(batch[f"features/{part}"], "b i s e -> (b i) s e").astype(dtype),
                                  self.cfg.encoder.part(part).prefix) for part in parts}
        return rearrange(self.mfam(features, remat=self.remat), "(b i) n d -> b (i n) d", b=rows)

    def embed(self, tokens: Int[Array, "B T"], visual: Int[Array, "B T"],
              pool: Float[Array, "B M D"]) -> Float[Array, "B T D"]:
        """Word embeddings, and at positions with `visual >= 0` that token of the same row's pool.

        The gather never leaves its row, so that rows on different devices exchange nothing.
        """
        words = self.decoder.embed(tokens, pool.dtype)
        seen = jnp.take_along_axis(pool, jnp.maximum(visual, 0)[..., None], axis=1)
        return jnp.where((visual >= 0)[..., None], seen, words)

    def __call__(self, batch: dict[str, Array], parts: tuple[str, ...], *, dtype: Any = jnp.float32,
                 freeze_encoder: bool = False, key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Hidden states of a batch of packed rows (`data.pipeline` documents its arrays)."""
        return self.read(batch, self.look(batch, parts, dtype=dtype, freeze_encoder=freeze_encoder), key=key)

    def read(self, batch: dict[str, Array], pool: Float[Array, "B M D"], *, key: Key[Array, ""] | None = None
             ) -> Float[Array, "B T D"]:
        """`__call__` where the visual tokens are known."""
        x = self.embed(batch["tokens"], batch["visual"], pool)
        return self.decoder(x, batch["positions"], batch["segments"], remat=self.remat, key=key)

    def phrases(self, ids: Int[Array, "A P W"]) -> Float[Array, "A G D"]:
        """What the light head draws visual tokens to, see `phrase_embeddings`."""
        count = ids.shape[0]
        words = self.decoder.embed(jnp.maximum(rearrange(ids, "a p w -> a (p w)"), 0), jnp.float32)
        return phrase_embeddings(rearrange(words, "a (p w) d -> a p w d", a=count, w=ids.shape[2]), ids)

    def answer_logits(self, hidden: Float[Array, "B T D"], places: Int[Array, "B K"]) -> Float[Array, "B K V"]:
        """float32 logits at the supervised positions only; position t predicts token t + 1."""
        return self.decoder.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))
