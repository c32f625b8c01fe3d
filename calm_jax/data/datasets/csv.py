"""A table `image,score[,user][,comment][,split]` in, entries with scores, raters and comments out."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from calm_jax.data.builders import labels
from calm_jax.errors import ConfigError

SPLIT_NAMES = {**{split: split for split in labels.SPLITS}, "val": "validation", "valid": "validation",
               "dev": "validation"}


class Csv(labels.Source):
    """Anybody's scores: pictures relative to the folder of the table; several rows a picture are several raters.

    A row may have a comment and no score. Rows without a user are averaged with the others.
    """

    name = "csv"
    title = "a table of scores"
    licence = "that of the pictures and the scores"
    scale = None

    def entries(self) -> Iterator[labels.Entry]:
        """One a picture, in the order of their first rows."""
        if self.scale is None:
            raise ConfigError("a table does not tell the scale of its scores; give --scale LOWEST,HIGHEST, "
                              "such as --scale 1,10")
        path = self.sole_file(".csv")
        scores: dict[str, list[float]] = collections.defaultdict(list)
        ratings: dict[str, dict[str, float]] = collections.defaultdict(dict)
        comments: dict[str, list[str]] = collections.defaultdict(list)
        splits: dict[str, str] = {}
        with_splits = False
        # `score` is read as text: a row may have a comment alone.
        rows = self.table(path, pictures=("image",), blank=("score",), optional=("user", "comment", "split"))
        for count, row in enumerate(rows, 1):
            image, place = row["image"], f"{path.name}, row {count}"
            try:
                score = labels.number(row["score"]) if row["score"] else None
            except ValueError:
                self.malformed.append(f"{place}: score is {row['score'][:40]!r}, not a number")
                continue
            split = SPLIT_NAMES.get(row["split"].lower(), "") if row["split"] else ""
            wrong = ("neither a score nor a comment" if score is None and not row["comment"] else
                     f"{row['user']} rates {image} twice" if score is not None and row["user"] in ratings[image] else
                     f"{row['split']!r} is no split" if row["split"] and not split else
                     f"{image} is in two splits" if splits.setdefault(image, split) != split else "")
            if wrong:
                self.malformed.append(f"{place}: {wrong}")
                continue
            with_splits |= bool(split)
            if score is not None:
                self.check_scale(score, place)
                scores[image].append(score)
                if row["user"]:
                    ratings[image][row["user"]] = score
            if row["comment"] and row["comment"] not in comments[image]:
                comments[image].append(row["comment"])
        found = [image for image in splits if scores.get(image) or comments.get(image)]
        if with_splits:
            self.origin = f"the column `split` of {path.name}"
        else:
            splits = self.parted(found)
        for image in found:
            label = labels.averaged(scores[image]) if scores.get(image) else {}
            label |= {"ratings": ratings[image]} if ratings.get(image) else {}
            label |= {"comments": comments[image]} if comments.get(image) else {}
            yield labels.Entry(splits[image] or "train", image, image, label)


SOURCE = Csv
