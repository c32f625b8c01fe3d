"""The name of a dataset in, the Dataset out. One module a dataset, imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from calm_jax import config as config_lib
from calm_jax.data.samples import Dataset
from calm_jax.errors import ConfigError

if TYPE_CHECKING:
    from calm_jax.data.builders.labels import Source

# Datasets that calm prepare stores: name, which is also the module's -> its Source in that module.
_SOURCES = {"para": "Para", "oasis": "Oasis", "ava": "Ava", "folder": "Folder", "csv": "Csv", "qa": "Qa"}


def names() -> tuple[str, ...]:
    """The datasets that this package knows; `folder`, `csv` and `qa` may be stored under other names."""
    return ("demo", *_SOURCES)


def source(name: str) -> type[Source]:
    """The class that reads a dataset as it was published.

    Raises:
      ConfigError: there is none of that name (the nearest is given).
    """
    if name not in _SOURCES:
        raise ConfigError(f"there is no dataset {name!r} to prepare{config_lib.nearest(name, _SOURCES)}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), _SOURCES[name])


def load(name: str, data_dir: str = "") -> Dataset:
    """The dataset of that name: `demo`, or one that calm prepare stored in `data_dir`; pixels are read later.

    Raises:
      ConfigError: there is no such dataset (the nearest name is given), it was not prepared (the command is given), or
        what it needs is not installed.
    """
    if name == "demo":
        return importlib.import_module(f"{__name__}.demo").build()
    from calm_jax.data.builders import stored
    known = {*names(), *(stored.names(data_dir) if data_dir else ())}
    if name not in known:
        raise ConfigError(f"there is no dataset {name!r}{config_lib.nearest(name, sorted(known))}")
    if not data_dir:
        raise ConfigError(
            f"the dataset {name!r} is read from a folder of prepared datasets, and none is named: give "
            "--config.data.dir=DIR to train, --data_dir DIR to evaluate; to prepare it: calm prepare "
            f"--dataset {name} --source DIR --data_dir DIR")
    return stored.Stored(name, data_dir)
