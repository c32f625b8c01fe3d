"""A checkpoint and photographs in; what its light head says of them out, from features that training has kept."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.checkpoints import restore
from calm_jax.data import images
from calm_jax.data.samples import Dataset
from calm_jax.features import frozen
from calm_jax.features.encoding import Encoding, Seen
from calm_jax.models.encoders import Feature
from calm_jax.models.parameters import Geometry, Parameters

ROWS = 50  # photographs at a time


def looked(encoding: Encoding, kind: str, dataset: Dataset, indices: Sequence[int], what: str) -> Iterator[Seen]:
    """What an encoding knows of these records, in order: `features` or `pooled`."""
    def ask(index: int):
        record = dataset.record(index)
        content = dataset.content(record.image.index) if hasattr(dataset, "content") else None
        return encoding.ask(kind, content, record.image, lambda: images.Fitter(dataset.pixels(record.image.index)))

    with tqdm.tqdm(total=len(indices), desc=what, unit="picture", mininterval=1.0) as bar:
        for start in range(0, len(indices), ROWS):
            waiting = [ask(int(index)) for index in indices[start:start + ROWS]]
            for wait in waiting:
                yield wait()
                bar.update()


def light(checkpoint: pathlib.Path, dataset: Dataset, indices: Sequence[int]) -> Float[np.ndarray, "n"]:
    """What `calm score --reader light` says, on the scale 1-10, up to the half precision of the features kept."""
    restored = restore.model(checkpoint)
    config, parameters = restored.config, restored.parameters
    geometry = Geometry.of(config.model)
    parts = config.processes[restored.saved.meta["process"]].parts
    encoding = frozen.encoder(config.model, geometry, parameters, restored.dtype, name="looking")

    @jax.jit
    def said(own: Parameters, features: dict[str, Float[Array, "n S E"]]) -> Float[Array, "n"]:
        model = geometry.bind({**geometry.shapes, **own})
        seen = {part: Feature(features[part].astype(restored.dtype), config.model.encoder.part(part).prefix)
                for part in parts}
        return model.light_head.score(model.mfam(seen))

    own = {path: leaf for path, leaf in parameters.items() if path.startswith(("mfam/", "light_head/"))}
    found: list[np.ndarray] = []
    seen = looked(encoding, "features", dataset, indices, checkpoint.parents[1].name)
    while some := list(itertools.islice(seen, ROWS)):
        arrays = {part: np.stack([one.arrays[part] for one in some + some[-1:] * (ROWS - len(some))])
                  for part in parts}
        found.append(np.asarray(said(own, arrays))[:len(some)])
    encoding.close()
    return np.clip(np.concatenate(found), 1, 10)


@functools.cache
def pooled(start: str, dataset: Dataset, split: str) -> Float[np.ndarray, "n F"]:
    """A few statistics of the features of all photographs of a split, part by part; what the encoder has not seen yet
    it sees now, for every arm."""
    restored = restore.model(start)
    laptop = config_lib.model("laptop")
    geometry = Geometry.of(laptop)
    own = {path: leaf for path, leaf in restored.parameters.items() if path.startswith("encoder/")}
    encoding = frozen.encoder(laptop, geometry, own, restored.dtype, name="looking")
    rows = [np.concatenate([one.arrays[part].astype(np.float32).ravel() for part in config_lib.PARTS])
            for one in looked(encoding, "pooled", dataset, dataset.indices(split), f"{split}: encoder")]
    encoding.close()
    return np.stack(rows)
