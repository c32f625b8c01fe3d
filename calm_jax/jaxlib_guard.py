"""Keep jaxlib releases that compute wrong numbers on CPU from doing so; imported before anything of JAX runs.

jaxlib 0.10.2 and 0.11.0 hand reductions to YNNPACK, which returns wrong sums for some shapes in 0.10.2 (jax issue
39103) and crashes at rank 7 in both (39257, 40412). XLA reads its flags once, when its backend starts: until then one
flag takes reductions away from YNNPACK. XLA ends the process at a flag that it does not know, so other releases are
left alone: 0.10.1 and earlier, and 0.11.1 to 0.12.0.1, computed all three reproducers rightly.

What the guard costs is measured against a user's own flag, which stands and switches it off:
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+reduce is the release as it came.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings

AFFECTED = ("0.10.2", "0.11.0")
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SAFE = f"{FLAG}=-reduce"


def apply() -> None:
    """Adds the flag to XLA_FLAGS on an affected jaxlib, unless the user has set it himself.

    Where the backend runs already, the flag comes too late: the published reproducer is run once instead, and what it
    finds is a RuntimeWarning.
    """
    if FLAG in os.environ.get("XLA_FLAGS", "") or not _affected():
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SAFE}".strip()  # also for processes started later
    if _running() and not sums_are_right():
        warnings.warn(
            "JAX's CPU backend was started before calm_jax was imported, and this jaxlib ("
            f"{importlib.metadata.version('jaxlib')}) then computes wrong sums for some shapes; import calm_jax first, "
            f"or set XLA_FLAGS={SAFE}, or install a newer jax", RuntimeWarning, stacklevel=3)


def sums_are_right() -> bool:
    """Whether the published reproducer gives the right sums on CPU: 32,769 sums of squares in float32, each of one
    integer. True where JAX was told to do without a CPU backend."""
    import jax
    import jax.numpy as jnp
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return True
    with jax.default_device(cpu):
        rows = jnp.zeros((32_769, 3), jnp.float32).at[:, 0].set(jnp.arange(32_769))
        sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
        return bool((sums == rows[:, 0] ** 2).all())


def _affected() -> bool:
    try:
        return importlib.metadata.version("jaxlib") in AFFECTED
    except importlib.metadata.PackageNotFoundError:  # a build of one's own has no version to go by
        return False


def _running() -> bool:
    """Whether a backend of JAX has started in this process."""
    bridge = sys.modules.get("jax._src.xla_bridge")  # JAX's public interface has no such question
    return bridge is not None and bridge.backends_are_initialized()
