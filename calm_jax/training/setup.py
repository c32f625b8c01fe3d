"""One process of a config and a mesh in; its step, and where every array of it lives, out. Nothing is allocated.

The devices of the mesh need not exist: `calm plan` compiles the same step for slices that nobody owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.data import pipeline
from calm_jax.models.parameters import Geometry, numerics
from calm_jax.training import filters, optimizer
from calm_jax.training.step import State, Step, compile_train


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training process is made of before it has data.

    Attributes:
      learns: path -> whether it learns.
      kept: path -> shape, dtype and sharding; what learns, or has learned before, is float32.
      why: the numerics, in words.
      placements: the sharding of every array of the state.
    """

    process: config_lib.Process
    model: config_lib.Model
    mesh: jax.sharding.Mesh
    learns: Mapping[str, bool]
    kept: Mapping[str, jax.ShapeDtypeStruct]
    why: str
    tx: optax.GradientTransformation
    step: Step
    placements: State

    @classmethod
    def of(cls, config: config_lib.Config, name: str, geometry: Geometry, mesh: jax.sharding.Mesh,
           trained: frozenset[str] = frozenset(), backend: str = "") -> Setup:
        """Process `name` of a config.

        Args:
          trained: paths that earlier processes have trained.
          backend: of the mesh's devices; empty = that of this program.

        Raises:
          ConfigError: the process fits neither the mesh nor the parameters.
        """
        process = config.processes[name]
        sharding.check_batch(process, mesh, name)
        learns = filters.trainable(geometry.shapes, process)
        dtype, frozen_dtype, why = numerics(config.model, backend)
        layout = sharding.parameters(geometry.shapes, mesh)
        kept = {path: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if learns[path] or path in trained else frozen_dtype, sharding=layout[path])
            for path, leaf in geometry.shapes.items()}
        tx, schedule = optimizer.make(process.optimizer, process.steps)
        lora = config.model.lora
        step = Step(geometry, process, tx, schedule, dtype, mesh=mesh,
                    freeze_encoder=not any(learn for path, learn in learns.items() if path.startswith("encoder/")),
                    dropout=lora.rank > 0 and lora.dropout > 0)
        own = {path: layout[path] for path, learn in learns.items() if learn}
        moments = sharding.optimizer(tx, {path: kept[path] for path in own}, own, mesh)
        return cls(process, config.model, mesh, learns, kept, why, tx, step,
                   State(NamedSharding(mesh, PartitionSpec()), own, moments))

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.kept.items() if self.learns[path]}

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.kept.items() if not self.learns[path]}

    @property
    def moments(self) -> Any:
        """The optimizer state's shapes and shardings."""
        return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            jax.eval_shape(self.tx.init, self.trained), self.placements.optimizer)

    def compiled(self) -> Callable:
        """`step.train` under jit; it is compiled when it is first called, or lowered with `arguments`."""
        return compile_train(self.step, self.placements, {path: leaf.sharding for path, leaf in self.frozen.items()})

    def arguments(self) -> tuple[Any, ...]:
        """What `compiled` takes, as shapes."""
        single = self.placements.step
        state = State(jax.ShapeDtypeStruct((), jnp.int32, sharding=single), self.trained, self.moments)
        rows = pipeline.blank(self.process, self.model, cached=self.process.cached)
        batch = {name: jax.ShapeDtypeStruct((self.process.batch, *value.shape), value.dtype,
                                            sharding=sharding.rows(self.mesh)) for name, value in rows.items()}
        return state, self.frozen, batch, jax.eval_shape(lambda: jax.random.key(0))
