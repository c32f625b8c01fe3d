"""A public dataset as it was published in, a TFDS dataset of array_record shards that training reads, out.

    python -m tools.prepare_data --dataset para --source PARA --data_dir DATA
    python -m tools.prepare_data --dataset csv --scale 1,10 --name mine --source SCORES.csv --data_dir DATA

The same command again goes on after an interruption. Pictures are kept whole; those larger than --longest_side are
shrunk to it. What is missing or unreadable is counted and named; above --max_bad_share the build stops. docs/data.md
has a page of datasets. TensorFlow is not needed.
"""

from __future__ import annotations

from absl import flags

from calm_jax import command
from calm_jax.data import builders
from calm_jax.data.builders import store
from calm_jax.errors import ConfigError


def numbers(name: str, text: str | None, count: int) -> tuple[float, ...] | None:
    """The value of a flag such as `1,10`.

    Raises:
      ConfigError: it is not `count` numbers.
    """
    if not text:
        return None
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise ConfigError(f"--{name} {text} is not {count} numbers with commas between them")
    return values


def main() -> None:
    given = command.require("dataset", "source", "data_dir")
    kind = builders.source(given.dataset)
    source = kind(given.source, scale=numbers("scale", given.scale, 2), shares=numbers("shares", given.shares, 3))
    store.prepare(source, given.data_dir, name=given["name"].value or "", longest_side=given.longest_side,
                  max_bad_share=given.max_bad_share, workers=given.workers, rebuild=given.rebuild)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "which dataset the source is: para, oasis, ava, folder, csv or qa")
    flags.DEFINE_string("source", None, "folder with its labels and pictures; for csv and qa also the label file")
    flags.DEFINE_string("data_dir", None, "folder of prepared datasets, the config.data.dir of training")
    flags.DEFINE_string("name", None, "name to store it under; default: that of the dataset")
    flags.DEFINE_integer("longest_side", 512, "of a stored picture, pixels; larger ones are shrunk; 0 = kept as they "
                         "are up to 33 megapixels", lower_bound=0)
    flags.DEFINE_string("scale", None, "csv: lowest and highest score, such as 1,10")
    flags.DEFINE_string("shares", None, "of train, validation and test where there is no official split, such as "
                        "0.8,0.1,0.1")
    flags.DEFINE_float("max_bad_share", 0.05, "share of unusable pictures or label rows above which the build stops",
                       lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("workers", 0, "threads that decode pictures; 0 = one a core", lower_bound=0)
    flags.DEFINE_bool("rebuild", False, "remove an earlier build of that name first")
    command.run(main)
