"""The PARA folder (annotation/ and imgs/sessionN/) in, entries with scores, raters and facts out.

Two layouts are known by their files: the official one, a row for every rating in `annotation/PARA-Images.csv` with the
lists `PARA-GiaaTrain.csv` and `PARA-GiaaTest.csv`; and one with mean scores in `annotation/{train,val,test}.csv`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

from calm_jax.data.builders import labels
from calm_jax.errors import ConfigError

ASPECTS = {"quality": "qualityScore", "composition": "compositionScore", "color": "colorScore",
           "depth_of_field": "dofScore", "light": "lightScore", "content": "contentScore"}
EMOTIONS = ("amusement", "awe", "contentment", "disgust", "excitement", "fear", "neutral", "sadness")
MEANS = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}


class Para(labels.Source):
    """31,220 photographs, each rated 1 to 5 by about 25 of 438 people, with attributes and emotions.

    The official release has a list for training and one for testing; validation is a part of the former (ours).
    """

    name = "para"
    title = "PARA"
    homepage = "https://cv-datasets.institutecv.com/#/data-sets"
    licence = "research and learning only; no redistribution"
    citation = """@inproceedings{yang2022personalized,
  title={Personalized Image Aesthetics Assessment with Rich Attributes},
  author={Yang, Yuzhe and Xu, Liwu and Li, Leida and Qie, Nan and Li, Yaqian and Zhang, Peng and Guo, Yandong},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={19861--19869}, year={2022}}"""
    scale = (1.0, 5.0)
    shares = (0.97, 0.03, 0.0)

    def entries(self) -> Iterator[labels.Entry]:
        """One a picture; facts: `semantic` (the scene), `emotions` (emotion -> people) and the means of ASPECTS,
        as far as the layout knows them."""
        present = [(self.folder / "annotation" / name).is_file() for name in MEANS.values()]
        yield from self._means() if any(present) else self._ratings()

    def _means(self) -> Iterator[labels.Entry]:
        if self.given_shares:
            raise ConfigError(f"{self.folder} has its own lists for training, validation and testing; leave "
                              "--shares out")
        self.origin = "those of annotation/train.csv, val.csv and test.csv"
        more = self._histograms()
        for split, name in MEANS.items():
            path = self.file(f"annotation/{name}", what=f"the {split} labels")
            for row in self.table(path, pictures=("imageName",), text=("sessionId",), scores=("aestheticScore_mean",),
                                  numbers=("qualityScore_mean", *EMOTIONS)):
                known = more.get(row["imageName"], {}) if split == "test" else {}
                label = {"score": round(row["aestheticScore_mean"], 6), **known.get("label", {})}
                label["facts"] = {"quality": round(row["qualityScore_mean"], 6), **known.get("facts", {}),
                                  "emotions": {name: int(row[name]) for name in EMOTIONS if row[name]}}
                yield self._entry(split, row["sessionId"], row["imageName"], label)

    def _histograms(self) -> dict[str, dict[str, dict]]:
        """What PARA-GiaaTest.csv knows beyond test.csv."""
        path = self.folder / "annotation" / "PARA-GiaaTest.csv"
        if not path.is_file():
            return {}
        aspects = {fact: f"{column}_mean" for fact, column in ASPECTS.items()}
        return {row["imageName"]: {"label": {"spread": round(row["aestheticScore_std"], 6)},
                                   "facts": {"semantic": row["semantic"],
                                             **{fact: round(row[column], 6) for fact, column in aspects.items()}}}
                for row in self.table(path, pictures=("imageName",), text=("semantic",),
                                      numbers=("aestheticScore_std", *aspects.values()))}

    def _ratings(self) -> Iterator[labels.Entry]:
        path = self.file("annotation/PARA-Images.csv", "annotation/train.csv")
        sessions, scenes = {}, {}
        ratings: dict[str, dict[str, float]] = collections.defaultdict(dict)
        emotions: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * (1 + len(ASPECTS)))
        for row in self.table(path, pictures=("imageName",), text=("sessionId", "userId", "imageEmotion", "semantic"),
                              scores=("aestheticScore",), numbers=tuple(ASPECTS.values())):
            name = row["imageName"]
            if row["userId"] in ratings[name]:
                self.malformed.append(f"{path.name}: {row['userId']} rates {name} twice; the first rating counts")
                continue
            sessions[name], scenes[name] = row["sessionId"], row["semantic"]
            ratings[name][row["userId"]] = row["aestheticScore"]
            emotions[name][row["imageEmotion"]] += 1
            values = (1.0, *(row[column] for column in ASPECTS.values()))
            sums[name] = [a + b for a, b in zip(sums[name], values, strict=True)]
        split = self._official(ratings)
        for name in ratings:
            count, *totals = sums[name]
            facts = {"semantic": scenes[name], "emotions": dict(sorted(emotions[name].items())),
                     **{fact: round(total / count, 6) for fact, total in zip(ASPECTS, totals, strict=True)}}
            if name in split:
                yield self._entry(split[name], sessions[name], name, {**labels.rated(ratings[name]), "facts": facts})
            else:
                self.left_out["in neither of the official lists"] += 1

    def _official(self, names: dict) -> dict[str, str]:
        """Picture -> split from the official lists; by the given shares where there are no lists."""
        lists = {split: self.folder / "annotation" / f"PARA-Giaa{split.title()}.csv" for split in ("train", "test")}
        missing = [path.name for path in lists.values() if not path.is_file()]
        if missing:
            if self.given_shares is None:
                raise ConfigError(f"{self.folder}/annotation has no {missing[0]}, the official split of "
                                  "PARA; put it there, or draw a split of your own: --shares 0.8,0.1,0.1")
            return self.parted(names)
        listed = {split: {row["imageName"] for row in self.table(path, pictures=("imageName",))}
                  for split, path in lists.items()}
        self.origin = (f"official lists; validation is {self.shares[1]:g} of the training list, drawn by picture with "
                       f"seed {labels.SEED} (ours)")
        kept = 1.0 - self.shares[1]
        return self.parted(listed["train"] - listed["test"], (kept, 1.0 - kept, 0.0)) | dict.fromkeys(
            listed["test"], "test")

    def _entry(self, split: str, session: str, name: str, label: dict) -> labels.Entry:
        return labels.Entry(split, name.removesuffix(".jpg").removesuffix("_"), f"imgs/{session}/{name}", label)


SOURCE = Para
