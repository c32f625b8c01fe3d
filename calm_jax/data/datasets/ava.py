"""The AVA folder (AVA.txt, pictures, the list of test pictures) in, entries with counts, tags and comments out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from calm_jax.data.builders import labels
from calm_jax.errors import ConfigError

PICTURES = ("images", "images/images", "image", "")  # where unpacked releases keep <id>.jpg
TEST = ("test.txt", "test.jpgl", "generic_test.jpgl", "aesthetics_image_lists/generic_test.jpgl")
VALIDATION = ("validation.txt", "val.txt")
CAPTIONS = "CLEAN_AVA_FULL_AFTER_SUBJECTIVE_CLEANING.json"


class Ava(labels.Source):
    """255,530 photographs of dpchallenge.com with the counts of their votes from 1 to 10.

    A list of test pictures gives the split (19,928 of them in the paper); validation is a list or a part of the rest.
    Where the file of AVA-Captions lies beside AVA.txt, its sentences become comments.
    """

    name = "ava"
    title = "AVA"
    homepage = "https://github.com/imfing/ava_downloader"
    licence = "none stated; the photographs belong to their authors at dpchallenge.com: research use"
    citation = """@inproceedings{murray2012ava,
  title={{AVA}: A large-scale database for aesthetic visual analysis},
  author={Murray, Naila and Marchesotti, Luca and Perronnin, Florent},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition}, pages={2408--2415}, year={2012}}"""
    scale = (1.0, 10.0)
    shares = (0.99, 0.01, 0.0)

    def entries(self) -> Iterator[labels.Entry]:
        """One a line; facts: `counts` (votes for 1 to 10), `tags` (names where tags.txt has them, else numbers) and
        `challenge` (its number)."""
        path = self.file("AVA.txt")
        names = {words[0]: " ".join(words[1:]) for _, words in self._lines_of("tags.txt")}
        comments = self._comments()
        found: dict[str, dict] = {}
        for place, words in self.lines(path):
            self.rows += 1
            try:
                numbers = [int(word) for word in words]
                if len(numbers) != 15:
                    raise ValueError(f"{len(numbers)} numbers, and a line has 15")
                counts, (*tags, challenge) = numbers[2:12], numbers[12:]
                if min(counts) < 0 or not sum(counts):
                    raise ValueError("no votes")
                if words[1] in found:
                    raise ValueError(f"the picture {words[1]} again")
            except ValueError as error:
                self.malformed.append(f"{place}: {error}")
                continue
            facts = {"counts": counts, "challenge": challenge,
                     "tags": [names.get(str(tag), str(tag)) for tag in tags if tag]}
            found[words[1]] = {**labels.averaged(range(1, 11), counts), "facts": facts}
            if words[1] in comments:
                found[words[1]]["comments"] = comments[words[1]]
        if len(self.malformed) == self.rows:
            raise ConfigError(f"{path} is not AVA.txt: a line is `index image_id c1 .. c10 tag1 tag2 "
                              "challenge`, 15 whole numbers; fetch it again")
        split, folder = self._split(found), self._pictures(found)
        for number, label in found.items():
            yield labels.Entry(split[number], number, f"{folder}{number}.jpg", label)

    def _lines_of(self, name: str) -> Iterator[tuple[str, list[str]]]:
        return self.lines(self.folder / name) if (self.folder / name).is_file() else iter(())

    def _listed(self, names: tuple[str, ...]) -> set[str]:
        return {words[0].removesuffix(".jpg") for name in names for _, words in self._lines_of(name)}

    def _split(self, found: dict) -> dict[str, str]:
        test, validation = self._listed(TEST), self._listed(VALIDATION)
        if not test:
            if self.given_shares is None:
                raise ConfigError(f"{self.folder} has no list of test pictures ({', '.join(TEST)}: one id "
                                  "a line); put it there, or draw a split of your own: --shares 0.9,0.02,"
                                  "0.08")
            return self.parted(found)
        rest = found.keys() - test
        kept = 1.0 - self.shares[1]
        if validation:
            split = {number: "validation" if number in validation else "train" for number in rest}
            self.origin = "the lists beside AVA.txt"
        else:
            split = self.parted(rest, (kept, 1.0 - kept, 0.0))
            self.origin = (f"the test list beside AVA.txt; validation is {self.shares[1]:g} of the rest, drawn by "
                           f"picture with seed {labels.SEED} (ours)")
        return split | dict.fromkeys(test, "test")

    def _pictures(self, found: dict) -> str:
        """The folder that holds the pictures, judged by the first hundred: single ones may be missing anywhere."""
        first = list(itertools.islice(found, 100))
        places = [f"{place}/" if place else "" for place in PICTURES]
        return max(places, key=lambda place: sum((self.folder / f"{place}{number}.jpg").is_file() for number in first))

    def _comments(self) -> dict[str, list[str]]:
        path = self.folder / CAPTIONS
        if not path.is_file():
            return {}
        try:
            return {image["filename"].removesuffix(".jpg"): [sentence["raw"].strip() for sentence in image["sentences"]
                                                             if sentence["raw"].strip()]
                    for image in self.json(path)["images"]}
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is not the file of AVA-Captions; fetch it again, or move it away to "
                              "build AVA without comments") from None


SOURCE = Ava
