"""Any folder tree of pictures in, entries without labels out: what self-supervision needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from calm_jax.data.builders import labels
from calm_jax.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")


class Folder(labels.Source):
    """Pictures in a folder and the folders below it, also linked ones; other files and hidden ones are left out."""

    name = "folder"
    title = "a folder of pictures"
    licence = "that of the pictures"

    def entries(self) -> Iterator[labels.Entry]:
        """One a file whose name ends like a picture's, in the order of their paths."""
        found = []
        for place in self._files():
            if place.suffix.lower() in SUFFIXES:
                found.append(place.as_posix())
            else:
                self.left_out["files that do not end like a picture"] += 1
        if not found:
            raise ConfigError(f"{self.folder} holds no pictures ({', '.join(SUFFIXES)}); give a folder of "
                              "pictures as --source")
        split = self.parted(found)
        for name in found:
            yield labels.Entry(split[name], name, name, {})

    def _files(self) -> list[PurePosixPath]:
        """Every file once, by its place in the folder or else by the first link to it; links to folders elsewhere are
        followed."""
        root = os.path.realpath(self.folder)
        entered, named = {root}, []
        for folder, below, names in os.walk(self.folder, followlinks=True, onerror=_stop):
            kept = []
            for name in sorted(below):
                path = os.path.join(folder, name)
                if name.startswith("."):
                    continue
                if os.path.islink(path):
                    real = os.path.realpath(path)
                    if real in entered or _holds(root, real) or _holds(real, root):  # a loop, or found in its place
                        self.left_out["links to a folder that is found elsewhere"] += 1
                        continue
                    entered.add(real)
                kept.append(name)
            below[:] = kept
            true_folder = os.path.realpath(folder)
            for name in names:
                if not name.startswith("."):
                    path = os.path.join(folder, name)
                    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(true_folder, name)
                    place = PurePosixPath(os.path.relpath(path, self.folder))
                    named.append((real != os.path.join(root, place), place, real))
        places: dict[str, PurePosixPath] = {}
        for _, place, real in sorted(named):
            if places.setdefault(real, place) != place:
                self.left_out["links to a file that is found elsewhere"] += 1
        return sorted(places.values())


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _stop(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}; check --source") from None


SOURCE = Folder
