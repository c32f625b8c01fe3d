"""Exchangeable parts by name: encoders, decoders, tokenizers, chat templates, data sets; ours and other packages'.

Ours are found by themselves: a file `NAME.py` in the folder of its kind that assigns the kind's attribute. A part of
another package is found by an entry point of that package, or registered from Python:

    [project.entry-points."calm_jax.encoders"]
    retina = "my_package.retina:RetinaConfig"

    registry.ENCODERS.register("retina", RetinaConfig)

Nothing is imported before somebody asks for it by its name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
from typing import Any

from calm_jax.errors import ConfigError, nearest


class Registry:
    """The parts of one kind.

    Attributes:
      kind: what they are, in a sentence.
      package: the package of which each module holds one of ours.
      attribute: what such a module assigns the part to.
      group: of the entry points of other packages.
    """

    def __init__(self, kind: str, package: str, attribute: str, group: str):
        self.kind, self.package, self.attribute, self.group = kind, package, attribute, group
        self._registered: dict[str, Any] = {}

    def register(self, name: str, part: Any) -> None:
        """Makes a part known under a name, in this process; the same one may come twice.

        Raises:
          ConfigError: the name is taken.
        """
        if self._registered.get(name, part) is not part or name in self._ours():
            raise ConfigError(f"the name {name!r} of {self.kind} is taken; choose another one")
        self._registered[name] = part

    def get(self, name: str) -> Any:
        """The part of a name.

        Raises:
          ConfigError: there is none, or the package that offers it cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._ours():
            return getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute)
        offered = self._offered()
        if name not in offered:
            raise ConfigError(f"there is no {self.kind} {name!r}{nearest(name, self.names())}; one of another package "
                              f"needs that package installed, with an entry point in {self.group}")
        try:
            return offered[name].load()
        except Exception as error:
            raise ConfigError(f"the {self.kind} {name!r} of {offered[name].value} cannot be imported: {error!r}"
                              ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._registered or name in self._ours() or name in self._offered()

    def names(self) -> list[str]:
        """All that there are, ours first."""
        return list(dict.fromkeys([*self._ours(), *sorted(self._offered()), *sorted(self._registered)]))

    def _ours(self) -> list[str]:
        folder = pathlib.Path(__file__).parent.joinpath(*self.package.split(".")[1:])
        return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))

    def _offered(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}


# name -> subclass of `config.Encoder`
ENCODERS = Registry("encoder", "calm_jax.models.encoders", "CONFIG", "calm_jax.encoders")
# name -> subclass of `config.Decoder`
DECODERS = Registry("decoder", "calm_jax.models.decoders", "CONFIG", "calm_jax.decoders")
# name -> subclass of `data.builders.labels.Source`
DATASETS = Registry("data set", "calm_jax.data.datasets", "SOURCE", "calm_jax.datasets")
# name -> class with what `text.tokenizers.Tokenizer` has
TOKENIZERS = Registry("tokenizer", "calm_jax.text.tokenizers", "TOKENIZER", "calm_jax.tokenizers")
# name -> `text.templates.ChatTemplate`
TEMPLATES = Registry("chat template", "calm_jax.text.templates", "TEMPLATE", "calm_jax.templates")
# name of a family -> `convert.families.Family`
WEIGHTS = Registry("weight table", "calm_jax.convert.families", "FAMILY", "calm_jax.weights")
