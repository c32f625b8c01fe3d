"""An answer in words in, a score on the conversation's 1-10 scale out (the text reader, as in the paper)."""

from __future__ import annotations

import re

LOWEST, HIGHEST = 1.0, 10.0
_DECIMAL = re.compile(r"(?<![\d.])\d{1,2}(?:\.\d+)?(?!\d)")


def read_score(text: str) -> float | None:
    """The first decimal from 1 to 10 in an answer such as "6.5."; None when there is none (a parse failure)."""
    for found in _DECIMAL.findall(text):
        if LOWEST <= float(found) <= HIGHEST:
            return float(found)
    return None
