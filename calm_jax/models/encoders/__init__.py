"""Visual encoders, one family a file. A family is found by the name of its file (`registry.ENCODERS`).

To add one: a file here with a config, a subclass of `config.Encoder` assigned to CONFIG, whose `build` makes a module
with the method of `Encoder`. Parameters named as in the other families need no sharding rule of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, UInt8


class Feature(NamedTuple):
    """What an encoder sees of one part: `tokens`, the first `prefix` of which stand for no place in the image."""

    tokens: Float[Array, "B S E"]
    prefix: int


class Encoder(Protocol):
    """A visual encoder: an `nnx.Module` with this method. It is given images as they were read, and normalises them by
    the mean and standard deviation of its own training images."""

    def features(self, images: UInt8[Array, "B H W 3"], parts: tuple[str, ...], *, dtype: Any,
                 remat: str = "none") -> dict[str, Feature]:
        """Features of the parts named, in the geometry that the config's `part` declares; the others are not computed.

        Args:
          images: RGB 0..255, H = W = the config's `image_size`.
          dtype: of the computation and the result.
          remat: what a block keeps for its backward pass (`config.Model.remat`).
        """
        ...
