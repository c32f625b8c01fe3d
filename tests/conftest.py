"""Nothing in; for the tests and what they start, an environment where JAX compiles quickly and each program once, and
libraries use one thread, out.

Set here, before JAX is imported; pytest's workers and all programs that tests start inherit it.
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

# Threads of torch and numpy wait for each other by spinning; with two workers on two cores they do little else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the models are tiny: compiling is what takes time
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="calm_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "CALM_CACHE" not in os.environ:  # what is kept of pictures: nothing of the user's is found, nothing is left to him
    os.environ["CALM_CACHE"] = tempfile.mkdtemp(prefix="calm_jax-pictures-")
    atexit.register(shutil.rmtree, os.environ["CALM_CACHE"], ignore_errors=True)
# XLA's older code generator for fused loops takes a third of the time of the one that programs use. Later versions have
# it no more, and refuse a flag that they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10.") and "xla_cpu_use_fusion_emitters" not in os.environ.get(
        "XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
import calm_jax  # noqa: F401  what a jaxlib computes wrongly is switched off before its backend starts

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects that live: looking through them is 5 % of the time
