"""What every program looks at before it begins: numbers that are none, and addresses in the place of paths."""

from __future__ import annotations

import sys

import miniature
import pytest

PROGRAM = """
from typing import Annotated
import typer
from calm_jax import cli
def main(paths: Annotated[list[str] | None, typer.Argument()] = None,
         threshold: Annotated[float, typer.Option(min=0.0)] = 1.0, out: str = "", workdir: str = "",
         base_url: str = "") -> None:
    print("ran", *paths)
cli.single(main)
"""


@pytest.mark.parametrize(("words", "named"), [
    (["--threshold=nan"], "--threshold"), (["--threshold=inf"], "--threshold"), (["--threshold=-1"], "threshold"),
    (["--out=gs://bucket/out"], "--out"), (["--workdir=runs/a,s3://bucket/b"], "--workdir"),
    (["a.jpg", "gs://bucket/b.jpg"], "gs://bucket/b.jpg"),
    (["--base_url=http://localhost:1/v1", "--threshold=2", "--out=a:b/c", "word"], "")])
def test_values_that_no_program_can_use_are_refused_by_name(words, named):
    done = miniature.run([sys.executable, "-c", PROGRAM, *words], miniature.environment())
    if not named:
        assert (done.returncode, done.stdout) == (0, "ran word\n"), done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
        assert not done.stdout
