"""A task and a dataset in; the figures that others have published for them out.

From the papers themselves, in their own protocols (paper.md lists them); ours stand beside them for orientation, not as
a comparison on equal terms.
"""

from __future__ import annotations

import types
from collections.abc import Mapping


def _pairs(first: str, second: str, figures: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, str]]:
    return {peer: {first: f"{one:.3f}", second: f"{other:.3f}"} for peer, (one, other) in figures.items()}


PUBLISHED: Mapping[tuple[str, str], Mapping[str, Mapping[str, str]]] = types.MappingProxyType({
    ("scoring", "ava"): _pairs("PLCC", "SRCC", {
        "NIMA": (.636, .612), "MUSIQ": (.738, .726), "VILA-R": (.774, .774),
        "LLaVA-1.5, fine-tuned with text scores": (.777, .781), "Q-Align": (.817, .822), "ArtiMuse": (.826, .827),
        "CALM": (.829, .815), "UNIAA, regression head": (.838, .840), "RvTC": (.842, .843)}),
    ("personalised", "flickr_aes"): _pairs("SRCC, 10 shots", "SRCC, 100 shots", {
        "PA-IAA": (.543, .639), "BLG-PIAA": (.561, .669), "TAPP-PIAA": (.591, .685), "task vectors": (.668, .748)}),
})


def published(task: str, dataset: str) -> Mapping[str, Mapping[str, str]]:
    """Peer -> name of a figure, as `evaluate.summary` calls it -> the figure; empty where none is known."""
    return PUBLISHED.get((task, dataset), {})
