"""A checkpoint in, a Hugging Face folder out."""

from __future__ import annotations

import json
from typing import Any

from calm_jax.convert import hf_export


def run(checkpoint: str, out: str, **options: Any) -> None:
    """Exports, and says what the model was taught and how to load it.

    Args:
      options: as `hf_export.export` takes them.

    Raises:
      ConfigError, CheckpointError: see `hf_export.export`.
    """
    path = hf_export.export(checkpoint, out, **options)
    known = json.loads((path / "config.json").read_text())["taught"]
    print(f"this model is of the process {known['process'] or '(none: it was converted)'}, which taught it "
          f"{', '.join(known['tasks']) or 'nothing'}; to export another process, give its folder")
    print(f"written to {path}; load it with AutoModelForCausalLM.from_pretrained({str(path)!r}, "
          "trust_remote_code=True)")
