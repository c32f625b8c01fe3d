"""Visual tokens: how many there are, and at which scale a randomly initialised MFAM gives them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
from flax import nnx

from calm_jax import config as config_lib
from calm_jax.models.encoders import Feature
from calm_jax.models.mfam import Mfam


@pytest.mark.parametrize("rms", [0.0, 0.136])
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_fresh_tokens_have_the_scale_of_words_and_their_number(rms, pool):
    model = dataclasses.replace(miniature.MODEL, visual_rms=rms, thematic=config_lib.Thematic(pool, norm=True))
    mfam = Mfam(model, nnx.Rngs(0))
    features = {}
    for number, part in enumerate(config_lib.PARTS):  # depths differ in scale, and each has a mean of its own
        seen = model.encoder.part(part)
        noise = jax.random.normal(jax.random.key(number), (64, seen.tokens, seen.width))
        features[part] = Feature(5.0 * number + 10.0 ** number * noise, seen.prefix)
    tokens = mfam(features)
    assert tokens.shape[1] == sum(model.visual_tokens(part) for part in config_lib.PARTS)
    first = 0
    for part in config_lib.PARTS:
        own = tokens[:, first:first + model.visual_tokens(part)]
        first += own.shape[1]
        found = float(jnp.sqrt(jnp.square(own).mean()))
        np.testing.assert_allclose(found, rms or 1.0, rtol=0.35, err_msg=part)  # 32 channels: kernels vary
