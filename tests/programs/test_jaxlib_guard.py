"""Sums are right on every jaxlib: the releases that get them wrong are told not to, whatever else XLA_FLAGS holds."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import miniature
import pytest

AFFECTED = importlib.metadata.version("jaxlib") in ("0.10.2", "0.11.0")
SUMS = """
import jax, jax.numpy as jnp
rows = jnp.zeros((32769, 3)).at[:, 0].set(jnp.arange(32769))
sums = jax.jit(lambda x: jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2))(x))(rows)
"""
TOLD = "import os; print(bool((sums == rows[:, 0] ** 2).all()), len(jax.devices()), os.environ.get('XLA_FLAGS', ''))"


def fresh(code: str, flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
           "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_sums_are_right_and_a_users_own_flags_are_kept():
    right, devices, flags = fresh("import calm_jax\n" + SUMS + TOLD, "--xla_force_host_platform_device_count=2"
                                  ).stdout.split(maxsplit=2)
    assert right == "True" and devices == "2"
    assert "--xla_force_host_platform_device_count=2" in flags and ("ynn" in flags) == AFFECTED


@pytest.mark.skipif(not AFFECTED, reason="this jaxlib computes right sums without a flag")
def test_a_users_own_choice_of_the_flag_stands():
    own = "--xla_cpu_experimental_ynn_fusion_type="  # no fusion at all
    right, _, flags = fresh("import calm_jax\n" + SUMS + TOLD, own).stdout.split(maxsplit=2)
    assert right == "True" and flags.strip() == own


@pytest.mark.parametrize("import_late", [True, False])
def test_a_backend_that_runs_already_is_tried_and_told_of(import_late):
    """Where nothing ran before, nothing is said."""
    code = "import jax\n" + ("jax.devices()\n" if import_late else "") + "import calm_jax\n"
    assert ("RuntimeWarning" in fresh(code, "").stderr) == (AFFECTED and import_late)
