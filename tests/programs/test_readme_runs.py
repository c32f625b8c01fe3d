"""The README's commands, run one after the other as they stand, where a newcomer would run them.

What is replaced: the folders of public weights and of photographs, by small ones made here; and recipes are made small
by overrides that are put behind. What needs a public data set is left out, by name.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax.checkpoints import locate
from calm_jax.commands import demo

README = (miniature.ROOT / "README.md").read_text()
ELSEWHERE = {"oasis": "needs OASIS; tests/unit/test_evaluation.py runs that task"}


def commands() -> list[str]:
    found = []
    for _, block in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL):
        found += [line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("calm ")]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photographs of our own, someone's ratings of them, public weights, and a model that learned everything."""
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    where = tmp_path_factory.mktemp("newcomer")
    rng = np.random.default_rng(0)
    (where / "photos").mkdir()
    names = [*(f"photos/{number}.jpg" for number in range(4)), "a.jpg", "b1.jpg", "b2.jpg"]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(where / name)
    (where / "mine.csv").write_text("image,score\n" + "".join(f"{name},{1 + number % 5}\n" for number, name in
                                                              enumerate(names[:5])))
    subprocess.run([sys.executable, str(miniature.ROOT / "tests" / "hf_client.py"), "write", str(where / "hub")],
                   check=True, capture_output=True)
    (where / "hub" / "llm" / "tokenizer.model").write_bytes(
        (miniature.ROOT / "calm_jax" / "text" / "tokenizer_small.model").read_bytes())
    miniature.saved(where / "runs" / "all-tasks", tasks=("score", "comment", "personal"))
    return where


def adapted(command: str, place: pathlib.Path) -> list[str]:
    """The words of a command, with what is replaced and what makes it small."""
    words = shlex.split(command.replace("openai/clip-vit-large-patch14-336", "hub/vit").replace(
        "lmsys/vicuna-7b-v1.5", "hub/llm"))
    if words[1] != "train":
        return words
    names = {"pretrain": ("language", "self_supervised", "generic"), "finetune": ("comments", "scores")}
    recipe, _, size = words[words.index("--config") + 1].partition(":")
    overrides = dict(demo._SMALL) | {f"processes.{name}.{field}": value for name in names[recipe]
                                     for field, value in demo._FEW.items()}
    if size:  # as large as the weights that stand in for the public ones
        overrides = {name: value for name, value in overrides.items() if not name.startswith(
            ("model", "processes.language"))}
        model = locate.find(place / "runs" / "calm-7b").config.model
        for part in ("encoder", "qformer", "decoder"):
            overrides |= {f"model.{part}.{field}": value
                          for field, value in dataclasses.asdict(getattr(model, part)).items()}
    return [*words, *(f"--config.{field}={value}" for field, value in overrides.items())]


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_page(place):
    base = {name: value for name, value in miniature.environment().items()} | {"PYTHONPATH": str(miniature.ROOT)}
    ran = []
    for command in commands():
        if any(name in command for name in ELSEWHERE):
            continue
        words = [str(word) for word in adapted(command, place)]
        done = subprocess.run([sys.executable, "-m", "calm_jax", *words[1:]], cwd=place, env=base, text=True,
                              capture_output=True, timeout=900)
        refused = done.returncode == 2 and "never learned" in done.stderr  # which is an answer, too
        assert done.returncode == 0 or refused, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran.append(words[1])
    assert {"train", "evaluate", "convert", "score", "comment", "suggest", "attributes", "personalise", "export",
            "parity"} <= set(ran)
