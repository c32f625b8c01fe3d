"""The `7b` training steps lower for eight devices, quickly, in little memory, and without a weight being allocated."""

from __future__ import annotations

import json
import sys
import textwrap

import miniature
import pytest

MINUTES, GIBIBYTES = 2, 8

CODE = textwrap.dedent("""
    import importlib.util, json, sys, time
    begin = time.monotonic()
    import jax, jax.numpy as jnp
    from calm_jax import config as config_lib
    from calm_jax.models.parameters import Geometry
    from calm_jax import sharding
    from calm_jax.training.setup import Setup

    path, name = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("chosen", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.from_config_dict(module.get_config("7b"))
    mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=8, tensor=1))
    setup = Setup.of(config, name, Geometry.of(config.model), mesh, backend="tpu")
    trained, frozen = setup.trained, setup.frozen
    lowered = setup.compiled().lower(*setup.arguments())
    text = len(lowered.as_text())
    count = lambda table: sum(s.size for s in table.values())
    print(json.dumps({
        "seconds": time.monotonic() - begin, "trained": count(trained), "frozen": count(frozen), "module": text,
        "peak": PEAK * 1024,
        "arrays": sum(a.nbytes for a in jax.live_arrays())}))
""").replace("PEAK", miniature.PEAK)


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
