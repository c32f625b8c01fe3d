"""The name of a data set in, the Dataset out; how data sets are stored, and read again.

What each of them looks like as it was published is in `data.datasets`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from calm_jax.data.samples import Dataset
from calm_jax.errors import ConfigError, nearest
from calm_jax.registry import DATASETS

if TYPE_CHECKING:
    from calm_jax.data.builders.labels import Source

def names() -> tuple[str, ...]:
    """The data sets that are known; `folder`, `csv` and `qa` may be stored under other names."""
    return ("demo", *DATASETS.names())


def source(name: str) -> type[Source]:
    """The class that reads a data set as it was published.

    Raises:
      ConfigError: there is none of that name (the nearest is given).
    """
    return DATASETS.get(name)


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
        raise ConfigError(f"there is no dataset {name!r}{nearest(name, sorted(known))}")
    if not data_dir:
        raise ConfigError(
            f"the dataset {name!r} is read from a folder of prepared datasets, and none is named: give "
            "--config.data.dir=DIR to train, --data_dir DIR to evaluate; to prepare it: calm prepare "
            f"--dataset {name} --source DIR --data_dir DIR")
    return stored.Stored(name, data_dir)
