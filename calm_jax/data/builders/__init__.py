"""The name of a dataset in, the Dataset out. One module a dataset, imported when it is asked for."""

from __future__ import annotations

import importlib

from calm_jax import config as config_lib
from calm_jax.data.samples import Dataset

# name -> module of this package; each has a function `build() -> Dataset`.
_MODULES = {"demo": "demo"}


def names() -> tuple[str, ...]:
    """The datasets that `load` knows."""
    return tuple(_MODULES)


def load(name: str) -> Dataset:
    """The dataset of that name; pixels are read later.

    Raises:
      ConfigError: there is no such dataset (the nearest name is given), or what it needs is not installed.
    """
    if name not in _MODULES:
        raise config_lib.ConfigError(f"there is no dataset {name!r}{config_lib.nearest(name, _MODULES)}")
    return importlib.import_module(f"{__name__}.{_MODULES[name]}").build()
