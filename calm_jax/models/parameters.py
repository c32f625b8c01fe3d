"""A model config in; its parameters as one flat table {path: array}, and a table back as a model, out.

Everything outside the models (optimizer, sharding, checkpoints, conversion) works on this table, whose keys are
paths such as `decoder/blocks/q/kernel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from calm_jax import config as config_lib
from calm_jax.models.calm import Calm

Parameters = dict[str, Array]
BLOCKS = "decoder/blocks/"


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The structure of a model without its values. `shapes`: path -> float32 ShapeDtypeStruct, in a fixed order, to
    read only: all who ask for a config get the same."""

    graphdef: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    shapes: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, cfg: config_lib.Model, *, unrolled: bool = False, transposed: bool = False) -> Geometry:
        """Traces the constructor, once for a config; nothing is allocated.

        Args:
          unrolled: of the parameters that `unroll` returns, with the same `transposed`.
        """
        def make():
            model = Calm(cfg, nnx.Rngs(0))
            if unrolled:
                model.decoder.unroll(transposed=transposed)
            return model

        graphdef, state = nnx.split(nnx.eval_shape(make))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        return cls(graphdef, treedef, {_name(path): leaf for path, leaf in leaves})

    def bind(self, parameters: Mapping[str, Array]) -> Calm:
        """The model with these parameters; safe inside jit, grad and scan."""
        state = jax.tree.unflatten(self.treedef, [parameters[path] for path in self.shapes])
        return nnx.merge(self.graphdef, state, copy=True)


def _name(path) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return "/".join(key for key in keys if key != "value")


def initial(cfg: config_lib.Model, key: Array) -> Parameters:
    """Random float32 parameters; call it under jit with output shardings, so that each device makes its own part."""
    state = nnx.state(Calm(cfg, nnx.Rngs(key)))
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def unroll(parameters: Parameters, *, transposed: bool) -> Parameters:
    """The same parameters with an array of its own for each block of the language model, as decoding wants them.

    `decoder/blocks/q/kernel` becomes `decoder/blocks/0/q/kernel` and so on. To hold no weight twice, drop `parameters`.

    Args:
      transposed: the kernels of the language model become `[O, I]`, as `Llama.unroll` wants them then.
    """
    unrolled: Parameters = {}
    for path, leaf in parameters.items():
        turned = transposed and path.startswith("decoder/") and path.endswith("/kernel")
        if path.startswith(BLOCKS):
            parts = _apart(leaf, leaf.shape[0], turned)
            unrolled |= {f"{BLOCKS}{index}/{path.removeprefix(BLOCKS)}": part for index, part in enumerate(parts)}
        else:
            unrolled[path] = _apart(leaf, 0, True)[0] if turned else leaf
    return unrolled


def _apart(leaf: Array, stacked: int, turned: bool) -> list[Array]:
    """The arrays that are stacked in one (0: not stacked), transposed if `turned`, each where it was."""
    place = leaf.sharding
    if isinstance(place, jax.sharding.NamedSharding):
        axes = [*place.spec, *[None] * (leaf.ndim - len(place.spec))][1 if stacked else 0:]
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*axes[::-1 if turned else 1]))
    return jax.jit(_parts, static_argnums=(1, 2), out_shardings=[place] * max(stacked, 1))(leaf, stacked, turned)


def _parts(leaf: Array, stacked: int, turned: bool) -> list[Array]:
    return [part.T if turned else part for part in (leaf if stacked else [leaf])]


def numerics(cfg: config_lib.Model, backend: str = "") -> tuple[jnp.dtype, jnp.dtype, str]:
    """(computation dtype, storage dtype of frozen parameters, why), for a backend or for that of this program."""
    backend = backend or jax.default_backend()
    auto = "float32" if backend == "cpu" else "bfloat16"
    pick = [jnp.dtype(auto if name == "auto" else name) for name in (cfg.dtype, cfg.frozen_dtype)]
    return pick[0], pick[1], f"compute {pick[0].name}, frozen {pick[1].name}, trained float32 (backend: {backend})"
