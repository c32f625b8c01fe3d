"""Sums are right on every jaxlib: the releases that get them wrong are told not to, whatever else XLA_FLAGS holds."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import miniature
import pytest

JAXLIB = importlib.metadata.version("jaxlib")
AFFECTED = JAXLIB in ("0.10.2", "0.11.0")
WRONG = JAXLIB == "0.10.2"  # 0.11.0 crashes, and at other shapes
SUMS = """
import jax, jax.numpy as jnp
rows = jnp.zeros((32769, 3)).at[:, 0].set(jnp.arange(32769))
sums = jax.jit(lambda x: jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2))(x))(rows)
"""
TOLD = "import os; print(bool((sums == rows[:, 0] ** 2).all()), len(jax.devices()), os.environ['XLA_FLAGS'] or 'none')"


def fresh(code: str, flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
           "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("own", ["", "--xla_force_host_platform_device_count=2"])
def test_sums_are_right_and_a_users_own_flags_are_kept(own):
    """JAX may be imported before, as long as it has not computed; nothing is said then."""
    done = fresh("import jax, calm_jax\n" + SUMS + TOLD, own)
    right, devices, flags = done.stdout.split(maxsplit=2)
    assert right == "True" and devices == ("2" if own else "1") and "RuntimeWarning" not in done.stderr
    assert own in flags and ("ynn" in flags) == AFFECTED


@pytest.mark.skipif(not AFFECTED, reason="this jaxlib computes right sums without a flag")
def test_a_users_own_choice_of_the_flag_stands():
    """Also where it brings the wrong sums back: that is how the cost of the guard is measured."""
    own = "--xla_cpu_experimental_ynn_fusion_type=+reduce"
    right, _, flags = fresh("import calm_jax\n" + SUMS + TOLD, own).stdout.split(maxsplit=2)
    assert flags.strip() == own and right == str(not WRONG)


def test_a_backend_that_runs_already_is_tried_and_told_of():
    assert ("RuntimeWarning" in fresh("import jax; jax.devices(); import calm_jax", "").stderr) == WRONG
