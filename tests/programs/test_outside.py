"""A package outside of calm_jax brings an encoder, a language model and a tokenizer, and everything else is ours."""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax import registry
from calm_jax.checkpoints import locate
from calm_jax.errors import ConfigError

OUTSIDE = pathlib.Path(__file__).parents[1] / "outside"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The package as an installer leaves it: its modules, and metadata with its entry points."""
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(OUTSIDE / "retina", place / "retina")
    metadata = place / "retina-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: retina\nVersion: 1.0\n")
    shutil.copyfile(OUTSIDE / "entry_points.txt", metadata / "entry_points.txt")
    base = miniature.environment()
    return base | {"PYTHONPATH": f"{place}:{base.get('PYTHONPATH', '')}"}


def picture(path: pathlib.Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(path)


def calm(environment, *words):
    return miniature.run([sys.executable, "-m", "calm_jax", *map(str, words)], environment)


@pytest.fixture(scope="module")
def workdir(environment, tmp_path_factory):
    """Trained for six steps: four, and after a stop the rest."""
    place = tmp_path_factory.mktemp("outside") / "run"
    train = ("train", "--config", OUTSIDE / "recipe.py", "--workdir", place)
    done = calm(environment, *train)
    assert done.returncode == 0, done.stderr
    newest = max((place / "checkpoints" / "only").glob("0*"))
    assert newest.name == "00000006"
    shutil.rmtree(newest)  # as a crash before the last checkpoint leaves it
    again = calm(environment, *train)
    assert again.returncode == 0 and "resum" in again.stdout + again.stderr, again.stdout + again.stderr
    assert (place / "checkpoints" / "only" / "00000006" / "COMPLETE.json").is_file()
    return place


def test_it_trains_resumes_scores_and_comments(environment, workdir, tmp_path):
    photo = tmp_path / "a.png"
    picture(photo)
    scored = calm(environment, "score", photo, "--checkpoint", workdir, "--format", "csv")
    assert scored.returncode == 0, scored.stderr
    value = float(scored.stdout.splitlines()[1].split(",")[1])
    assert 1 <= value <= 10
    said = calm(environment, "comment", photo, "--checkpoint", workdir, "--tokens", "8", "--format", "jsonl")
    assert said.returncode == 0 and '"comment"' in said.stdout, said.stderr


def test_a_plan_and_a_page_of_samples_know_it_as_well(environment, tmp_path):
    planned = calm(environment, "plan", "--config", OUTSIDE / "recipe.py", "--topology", "cpu:1")
    assert planned.returncode == 0, planned.stderr
    page = tmp_path / "page.html"
    shown = calm(environment, "samples", "--config", OUTSIDE / "recipe.py", "--rows", "1", "--out", page)
    assert shown.returncode == 0 and "im_end" in page.read_text(), shown.stderr


def test_export_refuses_it_in_one_sentence(environment, workdir, tmp_path):
    done = calm(environment, "export", "--checkpoint", workdir, "--out", tmp_path / "hf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "is of the family 'retina', and the torch model of exports computes clip, dinov2, siglip" in done.stderr
    assert not (tmp_path / "hf").exists()


def test_without_the_package_its_checkpoint_is_refused_by_the_name_of_the_family(workdir, tmp_path):
    photo = tmp_path / "a.png"
    picture(photo)
    done = calm(miniature.environment(), "score", photo, "--checkpoint", workdir)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "'retina'" in done.stderr, done.stderr


def test_the_three_levels_really_differ(environment, workdir):
    assert locate.is_workdir(workdir)
    code = ("from calm_jax import recipes; from calm_jax.models.parameters import Geometry; "
            f"c = recipes.load({str(OUTSIDE / 'recipe.py')!r}).config; "
            "print(*[Geometry.of(c.model).shapes[f'mfam/qformers/{i}/context_norm/scale'].shape for i in range(3)], "
            "*[c.model.encoder.part(p) for p in ('low', 'middle', 'high')])")
    done = miniature.run([sys.executable, "-c", code], environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\((\d+),\)", done.stdout) == ["16", "24", "40"]
    assert re.findall(r"tokens=(\d+)", done.stdout) == ["64", "17", "6"]


def test_names_are_registered_once():
    known = registry.Registry("thing", "calm_jax.text.templates", "TEMPLATE", "calm_jax.things")
    known.register("mine", 1)
    known.register("mine", 1)
    assert known.get("mine") == 1 and "mine" in known and "vicuna" in known and known.names()[-1] == "mine"
    for name in ("mine", "vicuna"):
        with pytest.raises(ConfigError, match=f"{name}.* is taken"):
            known.register(name, 2)
    with pytest.raises(ConfigError, match="the nearest is 'vicuna'"):
        known.get("vicunna")
