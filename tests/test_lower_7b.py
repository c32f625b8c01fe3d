"""The `7b` training steps lower for eight devices, quickly, in little memory, and without a weight being allocated."""

from __future__ import annotations

import json
import sys
import textwrap

import miniature
import pytest

MINUTES, GIBIBYTES = 2, 8

CODE = textwrap.dedent("""
    import importlib.util, json, resource, sys, time
    begin = time.monotonic()
    import jax, jax.numpy as jnp
    from calm_jax import config as config_lib
    from calm_jax.models.parameters import Geometry
    from calm_jax.training import filters, optimizer, sharding
    from calm_jax.training.step import State, Step, compile_train

    path, name = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("chosen", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.from_config_dict(module.get_config("7b"))
    process, row = config.processes[name], config.processes[name].row
    mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=8, tensor=1))
    sharding.check_batch(process, mesh, name)
    geometry = Geometry.of(config.model)
    learns, layout = filters.trainable(geometry.shapes, process), sharding.parameters(geometry.shapes, mesh)
    kept = {p: jax.ShapeDtypeStruct(s.shape, jnp.float32 if learns[p] else jnp.bfloat16, sharding=layout[p])
            for p, s in geometry.shapes.items()}
    trained = {p: s for p, s in kept.items() if learns[p]}
    frozen = {p: s for p, s in kept.items() if not learns[p]}
    tx, schedule = optimizer.make(process.optimizer, process.steps)
    moments = sharding.optimizer(tx, trained, {p: layout[p] for p in trained}, mesh)
    single = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    state = State(like(jax.ShapeDtypeStruct((), jnp.int32), single), trained,
                  jax.tree.map(like, jax.eval_shape(tx.init, trained), moments))
    size, place = config.model.vit.image_size, sharding.rows(mesh)
    shapes = {"images": ((row.images, size, size, 3), jnp.uint8), "places": ((row.answers,), jnp.int32),
              "labels": ((row.answers, row.candidates), jnp.int32), "bad": ((), jnp.int32),
              "asked": ((row.images,), jnp.int32), "targets": ((row.images,), jnp.float32),
              "weights": ((row.answers, row.candidates), jnp.float32),
              **{n: ((row.tokens,), jnp.int32) for n in ("tokens", "visual", "segments", "positions")}}
    batch = {n: jax.ShapeDtypeStruct((process.batch, *s), d, sharding=place) for n, (s, d) in shapes.items()}
    step = Step(geometry, process, tx, schedule, jnp.bfloat16, dropout=False, mesh=mesh,
                freeze_vit=not any(p.startswith("vit/") for p in trained))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = compile_train(step, State(single, {p: layout[p] for p in trained}, moments),
                             {p: layout[p] for p in frozen})
    lowered = compiled.lower(state, frozen, batch, key)
    text = len(lowered.as_text())
    count = lambda table: sum(s.size for s in table.values())
    print(json.dumps({
        "seconds": time.monotonic() - begin, "trained": count(trained), "frozen": count(frozen), "module": text,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "arrays": sum(a.nbytes for a in jax.live_arrays())}))
""")


@pytest.mark.parametrize(("config", "process", "trained"), [
    ("finetune", "scores", 6.9e9), ("pretrain", "self_supervised", 0.3e9)])
def test_the_7b_step_lowers_for_eight_devices_without_weights(config, process, trained):
    program = [sys.executable, "-c", CODE, f"configs/{config}.py", process]
    done = miniature.run(program, miniature.environment(devices=8))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(f"{config}.py:7b {process}: {result['seconds']:.1f} s, peak {result['peak'] / 2**30:.2f} GiB, trained "
          f"{result['trained'] / 1e9:.2f} and frozen {result['frozen'] / 1e9:.2f} thousand million parameters, "
          f"module text {result['module'] / 1e6:.2f} MB")
    assert result["trained"] == pytest.approx(trained, rel=0.1)
    assert result["trained"] + result["frozen"] > 7e9
    assert result["arrays"] < 1e6  # bytes of live arrays: not a single matrix
    assert result["seconds"] < 60 * MINUTES
    assert result["peak"] < GIBIBYTES * 2**30
