"""Any folder tree of pictures in, entries without labels out: what self-supervision needs."""

from __future__ import annotations

from collections.abc import Iterator

from calm_jax import config as config_lib
from calm_jax.data.builders import labels

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")


class Folder(labels.Source):
    """Pictures in a folder and the folders below it; other files and hidden ones are left out."""

    name = "folder"
    title = "a folder of pictures"
    licence = "that of the pictures"

    def entries(self) -> Iterator[labels.Entry]:
        """One a file whose name ends like a picture's, in the order of their paths."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            place = path.relative_to(self.folder)
            if any(part.startswith(".") for part in place.parts) or path.is_dir():
                continue
            if path.suffix.lower() in SUFFIXES:
                found.append(place.as_posix())
            else:
                self.left_out["files that do not end like a picture"] += 1
        if not found:
            raise config_lib.ConfigError(f"{self.folder} holds no pictures ({', '.join(SUFFIXES)}); give a folder of "
                                         "pictures as --source")
        split = self.parted(found)
        for name in found:
            yield labels.Entry(split[name], name, name, {})
