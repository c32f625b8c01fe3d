"""What a checkpoint was taught decides who answers: the process of a workdir that learned it, or a refusal."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys

import miniature
import numpy as np
import pytest
from PIL import Image

import calm_jax
from calm_jax import config as config_lib
from calm_jax.checkpoints import on_disk
from calm_jax.data.tasks import TASKS, instructions, skills
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.inference import choice

PAPER = {"comments": ("comment",), "scores": ("score",)}
KEEPS = {"comments": ("comment", "attributes"), "scores": ("score", "comment", "attributes", "suggestion")}


def workdir(folder: pathlib.Path, taught: dict[str, tuple[str, ...]], *, init: str = "", done: int | None = None,
            model: str = "", **fields) -> pathlib.Path:
    """A workdir whose processes learned these tasks, the first `done` of them so far; `model` is a checkpoint to put
    there, and without it nothing but what a choice looks at."""
    processes = {name: miniature.process(tasks=dict.fromkeys(tasks, 1.0), support=(1, 1), parts=config_lib.PARTS,
                                         **fields) for name, tasks in taught.items()}
    cfg = dataclasses.asdict(miniature.config(run=tuple(taught), processes=processes, init=init))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    for name in list(taught)[:done]:
        place = folder / "checkpoints" / name / "00000003"
        meta = {"process": name, "config": cfg}
        if model:
            (source,) = on_disk.folders(pathlib.Path(model))
            shutil.copytree(source, place)
            meta = json.loads((place / "meta.json").read_text()) | meta
        place.mkdir(parents=True, exist_ok=True)
        (place / "meta.json").write_text(json.dumps(meta))
        on_disk.write_marker(place)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return miniature.saved(tmp_path_factory.mktemp("weights"), config_lib.PARTS)


@pytest.fixture(scope="module")
def paper(tmp_path_factory, model):
    """A workdir of the paper's fine-tuning, with weights."""
    return workdir(tmp_path_factory.mktemp("runs") / "finetune", PAPER, model=model)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)).save(path)
    return str(path)


def test_every_task_and_every_question_has_its_place():
    for skill in skills.SKILLS.values():
        assert {*skill.tasks, *skill.zero_shot} <= TASKS.keys()
    assert set(skills.WORDS) <= TASKS.keys()
    for skill, questions in (("score", instructions.SCORE), ("levels", instructions.LEVEL),
                             ("ask", instructions.CAPTION), ("personalise", instructions.PERSONAL),
                             ("suggest", instructions.SUGGEST),
                             ("comment", (*instructions.COMMENT, *instructions.ASPECTS.values()))):
        assert {skills.for_question(question) for question in questions} == {skill}


@pytest.mark.parametrize(("skill", "taught", "answers"), [
    ("score", PAPER, "scores"), ("comment", PAPER, "comments"), ("suggest", PAPER, "comments"),
    *((skill, KEEPS, "scores") for skill in ("score", "comment", "attributes", "suggest")),
    ("levels", {"one": ("level",), "two": ("score",)}, "one"), ("personalise", {"tasks": ("personal",)}, "tasks"),
    ("suggest", {"pairs": ("suggestion",), "comments": ("comment",)}, "pairs"),  # taught goes before zero-shot
    ("score", {"all": ("score",), "mine": ("oasis:score",)}, "mine"), ("ask", {"only": ("caption",)}, "only")])
def test_the_latest_process_that_learned_it_answers(tmp_path, skill, taught, answers):
    folder = workdir(tmp_path / "run", taught)
    chosen = choice.choose(folder, skill)
    assert chosen.process == answers == choice.processes(folder)[skill] and answers in chosen.line
    own = set(skills.SKILLS[skill].tasks) & {name.split(":")[-1] for name in taught[answers]}
    assert (chosen.state == skills.TAUGHT) == bool(own)


@pytest.mark.parametrize(("skill", "taught", "recipe"), [
    ("attributes", PAPER, "--config pretrain"), ("personalise", PAPER, "--config first_look"),
    ("levels", PAPER, "level"), ("head", PAPER, "+head"), ("comment", {"pairs": ("caption",)}, "--config finetune"),
    ("score", {"mine": ("personal",)}, "--config finetune"),
    ("suggest", {"scores": ("score", "level", "personal")}, "--config finetune")])
def test_what_nobody_taught_is_refused_with_what_was_and_with_what_teaches_it(tmp_path, skill, taught, recipe):
    folder = workdir(tmp_path / "run", taught)
    with pytest.raises(ConfigError) as refused:
        choice.choose(folder, skill)
    sentence = str(refused.value)
    assert "\n" not in sentence and recipe in sentence and str(folder) in sentence
    assert all(name in sentence and all(task in sentence for task in tasks) for name, tasks in taught.items())
    assert skill not in choice.processes(folder)
    last = list(taught)[-1]
    for chosen in (choice.choose(folder, skill, process=last), choice.choose(folder, skill, as_it_is=True)):
        assert (chosen.process, chosen.state) == (last, skills.UNTAUGHT) and "never learned" in chosen.line


def test_a_head_counts_where_it_learned(tmp_path):
    folder = workdir(tmp_path / "run", {"scores": ("score",)})
    config = json.loads((folder / "config.json").read_text())
    assert "head" not in choice.processes(folder)
    config["processes"]["scores"]["score_head"] = 0.5
    config["model"]["score_head"]["width"] = 8
    file = folder / "checkpoints/scores/00000003/meta.json"
    file.write_text(json.dumps({"process": "scores", "config": config}))
    assert choice.processes(folder)["head"] == "scores"


def test_shuffled_labels_teach_nothing(tmp_path):
    folder = workdir(tmp_path / "control", {"self_supervised": ("attributes",)}, shuffle_labels=True)
    with pytest.raises(ConfigError, match="shuffled"):
        choice.choose(folder, "attributes")
    assert choice.choose(folder, "attributes", as_it_is=True).state == skills.UNTAUGHT  # a control is measured


def test_a_process_without_a_checkpoint_is_none_to_choose(tmp_path):
    folder = workdir(tmp_path / "run", PAPER, done=1)
    assert choice.processes(folder)["comment"] == "comments"
    with pytest.raises(ConfigError, match="never learned scores"):
        choice.choose(folder, "score")
    with pytest.raises(ConfigError, match="nearest is 'comments'"):
        choice.choose(folder, "score", process="comment")
    with pytest.raises(CheckpointError):
        choice.choose(tmp_path / "nowhere", "score")


def test_a_refusal_names_who_learned_it_beside_and_before(tmp_path):
    pretrain = workdir(tmp_path / "pretrain", {"self_supervised": ("attributes",), "generic": ("caption",)})
    folder = workdir(tmp_path / "finetune", PAPER, init=str(pretrain))
    for given in (folder / "checkpoints/scores", folder / "checkpoints/scores/00000003"):
        with pytest.raises(ConfigError, match="never learned comments") as refused:
            choice.choose(given, "comment")
        assert str(folder / "checkpoints/comments") in str(refused.value)
        with pytest.raises(ConfigError) as refused:
            choice.choose(given, "attributes")
        assert str(pretrain / "checkpoints/self_supervised") in str(refused.value)
        assert choice.choose(given, "score").path == given
        assert choice.choose(given, "comment", process="scores").state == skills.UNTAUGHT


def test_a_conversion_has_learned_nothing(tmp_path):
    place = tmp_path / "converted"
    place.mkdir()
    (place / "meta.json").write_text(json.dumps({"process": "", "config": dataclasses.asdict(
        miniature.config(run=(), processes={}))}))
    on_disk.write_marker(place)
    assert choice.processes(place) == {}
    for skill in skills.SKILLS:
        with pytest.raises(ConfigError, match="was converted and never trained"):
            choice.choose(place, skill)
    assert choice.seeing(place).path == place  # its encoder sees all the same


# ---- the programs ------------------------------------------------------------------------------------------------


def test_the_interface_answers_with_who_learned_it(paper, photo):
    model = calm_jax.load(paper)
    assert {name: model.processes.get(name) for name in ("score", "comment", "attributes", "personalise")} == {
        "score": "scores", "comment": "comments", "attributes": None, "personalise": None}
    model.score(photo)
    assert model.comment(photo, limit=2) == model.ask(photo, "Comment on this photograph.", limit=2)
    assert model.loaded("score").process == "scores" and model.loaded("comment").process == "comments"
    with pytest.warns(UserWarning, match="zero-shot"):
        model.suggest(photo, limit=2)
    for refused in (lambda: model.attributes(photo), lambda: model.personalise([(photo, 5)], photo, method="context"),
                    lambda: model.score(photo, reader="levels")):
        with pytest.raises(ConfigError, match="never learned"):
            refused()
    with pytest.warns(UserWarning, match="never learned"):
        calm_jax.load(paper, process="scores").comment(photo, limit=2)
    with pytest.raises(ConfigError, match="nearest is 'scores'"):
        calm_jax.load(paper, process="score")


def test_the_program_says_who_answers_and_refuses_what_nobody_learned(paper, photo, tmp_path):
    def calm(*words):
        return miniature.run([sys.executable, "-m", "calm_jax", *map(str, words)], miniature.environment())

    done = calm("comment", photo, "--checkpoint", paper, "--tokens", "2", "--format", "jsonl")
    assert done.returncode == 0 and "comment" in json.loads(done.stdout)
    assert sum("comments" in line and str(paper) in line for line in done.stderr.splitlines()) == 1
    out = tmp_path / "attributes.csv"
    done = calm("attributes", photo, "--checkpoint", paper, "--out", out)
    assert done.returncode == 2 and "--config pretrain" in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and not list(tmp_path.iterdir())
    done = calm("comment", photo, "--checkpoint", paper, "--process", "scores", "--tokens", "2")
    assert done.returncode == 0 and "never learned comments" in done.stderr


def test_an_evaluation_measures_who_learned_it_and_what_it_is_given(paper):
    def evaluate(model, *more):
        return miniature.run([sys.executable, "-m", "calm_jax.evaluate", "--workdir", str(model), "--task", "scoring",
                              "--records", "1", "--reader", "expectation", *more], miniature.environment())

    done = evaluate(f"{paper},{paper}/checkpoints/comments")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((paper / f"evaluation/scoring-demo-test-expectation-{number}.json").read_text())
                     for number in (1, 2))
    assert "/scores/" in first["checkpoint"] and "/comments/" in second["checkpoint"]
    assert "comments" in done.stderr and "never learned scores" in done.stderr
    done = evaluate(paper, "--reader", "levels")
    assert done.returncode == 2 and "never learned rating words" in done.stderr
