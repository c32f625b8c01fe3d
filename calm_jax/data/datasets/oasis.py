"""The OASIS folder (images/ and ratings.csv) in, entries with everybody's beauty ratings out."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from calm_jax.data.builders import labels


class Oasis(labels.Source):
    """900 everyday photographs of the Open Affective Standardized Image Set, 800 of them rated for beauty, 1 to 7.

    The ratings come from another study than the pictures. There is no official split.
    """

    name = "oasis"
    title = "OASIS with beauty ratings"
    homepage = "https://www.benedekkurdi.com/#oasis"
    licence = "pictures: open-access stimulus set; ratings: none stated, taken as research use"
    citation = """@article{kurdi2017oasis,
  title={Introducing the Open Affective Standardized Image Set ({OASIS})},
  author={Kurdi, Benedek and Lozano, Shayn and Banaji, Mahzarin R.},
  journal={Behavior Research Methods}, volume={49}, number={2}, pages={457--470}, year={2017}}
@article{brielmann2019beauty,
  title={Intense beauty requires intense pleasure},
  author={Brielmann, Aenne A. and Pelli, Denis G.},
  journal={Frontiers in Psychology}, volume={10}, pages={2420}, year={2019}}"""
    scale = (1.0, 7.0)
    shares = (0.8, 0.1, 0.1)

    def entries(self) -> Iterator[labels.Entry]:
        """One a picture; facts: `category` (Animal, Object, Person, Scene)."""
        ratings: dict[str, dict[str, float]] = collections.defaultdict(dict)
        categories: dict[str, str] = {}
        for row in self.table(self.file("ratings.csv"), pictures=("imageName",), text=("userId", "category"),
                              scores=("beauty",)):
            ratings[row["imageName"]][row["userId"]] = row["beauty"]
            categories[row["imageName"]] = row["category"]
        split = self.parted(ratings)
        for name in sorted(ratings):
            yield labels.Entry(split[name], name.removesuffix(".jpg"), f"images/{name}",
                               {**labels.rated(ratings[name]), "facts": {"category": categories[name]}})


SOURCE = Oasis
