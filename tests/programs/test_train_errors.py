"""Bad input to the training program: one clear sentence that names the thing and the remedy, and nothing harmed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
import sys

import jax
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.checkpoints import locate, on_disk
from calm_jax.checkpoints.meta import BEST
from calm_jax.commands import train as program
from calm_jax.data import builders, pipeline
from calm_jax.data.samples import BadRecord, ImageRef, Record
from calm_jax.errors import CheckpointError, ConfigError, TrainingError
from calm_jax.text import chat as chat_lib
from calm_jax.training import logging as logs
from calm_jax.training import loop
from calm_jax.training import workdir as workdirs


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with miniature.compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


class Coloured:
    """Thirty-six one-coloured pictures; `broken` ones cannot be read."""

    name = "coloured"

    def __init__(self, broken=(), fingerprint="0123"):
        self.broken, self.fingerprint = set(broken), fingerprint

    def indices(self, split: str) -> np.ndarray:
        return np.arange(32) if split == "train" else np.arange(32, 36)

    def record(self, index: int) -> Record:
        return Record(f"picture-{index:02d}", ImageRef(index), captions=(f"Number {index}.",))

    def pixels(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise BadRecord(f"/pictures/{index:02d}.jpg is truncated")
        return np.full((40, 30, 3), 5 + 7 * index, np.uint8)


@pytest.fixture
def coloured(monkeypatch):
    """Makes `builders.load` return the given dataset."""
    def use(**options):
        dataset = Coloured(**options)
        monkeypatch.setattr(builders, "load", lambda name, data_dir="": dataset)
        return dataset
    return use


def rows_of(dataset, process=None) -> pipeline.Rows:
    process = process or miniature.PROCESS
    return pipeline.Rows(process, {process.dataset: dataset}, chat_lib.load(), miniature.MODEL, seed=0, split="train")


# ---- the real program -------------------------------------------------------------------------------------------

FINETUNE = ("--config", "configs/finetune.py")
CASES = {  # arguments -> what the sentence says
    (*FINETUNE, "--config.modle.vit.width=1"): "config.modle is not a field; the nearest is 'model'",
    (*FINETUNE, "--config.model.encoder.widht=1"): "config.model.encoder.widht is not a field; the nearest is 'width'",
    (*FINETUNE, "--config.seed=abc"): "abc",
    (*FINETUNE, "--config.run=('scoers',)"): "run names the process 'scoers', which `processes` does not define; the "
                                             "nearest is 'scores'",
    ("--config", "configs/absent.py"): "configs/absent.py",
    ("--config", "configs/finetune.py:7B"): "there is no variant '7B'; the nearest is '7b'",
    (): "--config is missing: The recipe",
    (*FINETUNE, "--wrokdir=x"): "there is no option --wrokdir; the nearest is '--workdir'",
    (*FINETUNE, "--workdir=gs://bucket/run"): "--workdir=gs://bucket/run",
    (*FINETUNE, "--config.init=s3://bucket/run"): "init=s3://bucket/run",
    (*FINETUNE, "--config.processes.scores.optimizer.peak_lr=nan"): "peak_lr=nan",
    (*FINETUNE, "--config.mesh.data=3"): "mesh data=3 fsdp=-1 tensor=1 does not multiply to the 1 devices present",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What the program says to each of CASES; two at a time."""
    folder = tmp_path_factory.mktemp("cases")

    def ask(item):
        number, arguments = item
        place = [f"--workdir={folder / str(number)}"] if not any("dir=" in word for word in arguments) else []
        return miniature.run([sys.executable, "-m", "calm_jax.train", *arguments, *place], miniature.environment())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(ask, enumerate(CASES)), strict=True))


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(answers, arguments):
    done = answers[arguments]
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert CASES[arguments] in done.stderr


# ---- the workdir ------------------------------------------------------------------------------------------------


def test_a_changed_config_is_refused_with_the_difference_and_runtime_fields_may_change(tmp_path):
    program.claim(tmp_path / "run", miniature.config())
    program.claim(tmp_path / "run", miniature.config(mesh=config_lib.Mesh(data=2), log_every=7,
                                                     checkpoint=config_lib.Checkpoint(every_steps=9)))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        program.train(miniature.config(seed=5), tmp_path / "run")
    assert f"the workdir {tmp_path / 'run'} belongs to another config (config.seed: 0 -> 5)" in str(error.value)
    assert "choose another --workdir, or take the change back to resume" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_workdir_that_is_damaged_or_not_ours_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"holds checkpoints but no config.json; choose another --workdir"):
        program.claim(tmp_path, miniature.config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged; restore it, or choose another"):
        program.claim(tmp_path, miniature.config())


def test_a_workdir_in_which_another_training_works_is_refused_and_free_when_that_ends(tmp_path):
    with workdirs.held(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"{tmp_path / 'run'} .*pid {os.getpid()} ") as error:
            program.train(miniature.config(), tmp_path / "run")
        assert str(error.value).count("\n") == 0
        with workdirs.held(tmp_path / "other"):
            pass
    with workdirs.held(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'}"):
        program.train(miniature.config(), tmp_path / "file")


@pytest.mark.parametrize("wrong", [
    {"processes": {"only": miniature.process(dataset="dmeo")}}, {"init": "/nothing"}, {"tokenizer": "absent.model"},
    {"processes": {"only": miniature.process(row=config_lib.Row(tokens=40, images=2, answers=64))}}])
def test_a_start_that_fails_leaves_the_workdir_to_the_corrected_command(tmp_path, wrong):
    with pytest.raises((ConfigError, CheckpointError)):
        program.train(miniature.config(**wrong), tmp_path / "run")
    workdirs.check(tmp_path / "run", miniature.config())
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_mistake_in_the_last_process_is_found_before_the_first_begins(tmp_path):
    for wrong in ({"dataset": "dmeo"}, {"train": ("mfam/.*",)}):
        config = miniature.config(run=("one", "two"), processes={"one": miniature.PROCESS,
                                                                 "two": miniature.process(**wrong)})
        with pytest.raises(ConfigError, match=r"dmeo|matches none of train"):
            program.train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- before the first step --------------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tmp_path):
    model = dataclasses.replace(miniature.MODEL, decoder=dataclasses.replace(miniature.MODEL.decoder, vocab=32_000))
    with pytest.raises(ConfigError, match=r"tokenizer .*tokenizer_small.model has 2048 pieces and "
                       "model.decoder.vocab is 32000; set one to fit the other"):
        program.train(miniature.config(model=model), tmp_path / "run")


def test_a_tokenizer_that_is_absent_or_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.model: there is no such file"):
        program.train(miniature.config(tokenizer="absent.model"), tmp_path / "run")
    (tmp_path / "some.model").write_text("hello")
    with pytest.raises(ConfigError, match=r"some.model: the file is no SentencePiece model"):
        program.train(miniature.config(tokenizer=str(tmp_path / "some.model")), tmp_path / "other")


def test_an_unknown_dataset_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no dataset 'dmeo'; the nearest is 'demo'"):
        program.train(miniature.config(processes={"only": miniature.process(dataset="dmeo")}), tmp_path / "run")


def test_a_batch_that_does_not_divide_the_mesh_is_refused_before_anything_is_made(tmp_path, coloured, monkeypatch):
    coloured()
    monkeypatch.setattr(loop.sharding, "make_mesh", lambda cfg: jax.sharding.AbstractMesh(
        (1, 8, 1), loop.sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3))
    monkeypatch.setattr(loop, "say", lambda text: None)
    run = loop.Run(miniature.config(), tmp_path, loop.sharding.make_mesh(None), None, chat_lib.load())
    with pytest.raises(ConfigError, match=r"batch=2 over accumulate=1 makes 2 rows a micro-batch, which do "
                       r"not divide among data\*fsdp=8 devices; choose a batch that is a multiple of 8"):
        loop.run_process(run, "only", {"coloured": builders.load("coloured")})


def test_a_start_that_is_no_checkpoint_is_refused(tmp_path, coloured):
    coloured()
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint in .*nothing"):
        program.train(miniature.config(init=str(tmp_path / "nothing")), tmp_path / "run")


def test_a_start_with_another_tokenizer_is_refused(tmp_path, coloured):
    coloured()
    base = pathlib.Path(miniature.saved(tmp_path / "base")) / "00000003"
    meta = json.loads((base / "meta.json").read_text())
    (base / "tokenizer.model").write_bytes(b"another one")
    (base / "meta.json").write_text(json.dumps(meta | {"tokenizer": "0123456789ab"}))
    on_disk.write_marker(base)
    with pytest.raises((ConfigError, CheckpointError), match="tokenizer"):
        program.train(miniature.config(init=str(base)), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "only").exists()


# ---- while it runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps over sound pictures, with checkpoints after two and four."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "load", lambda name, data_dir="": Coloured())
        program.train(miniature.config(checkpoint=config_lib.Checkpoint(every_steps=2)), workdir)
    return workdir


def again(trained, tmp_path, *steps: int):
    """A copy of `trained` that has only the checkpoints of `steps`, so that the rest is trained again."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for path in on_disk.folders(workdir / "checkpoints" / "only"):
        if int(path.name) not in steps:
            shutil.rmtree(path)
    return workdir


def test_training_is_not_resumed_on_other_content(trained, tmp_path, coloured):
    """Of the same name: the data set, its name and the remedy are said, and the checkpoints stay as they are."""
    workdir = again(trained, tmp_path, 2)
    (workdir / "checkpoints" / "only" / BEST).unlink()  # of a step that is no longer there
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    coloured(fingerprint="4567")
    with pytest.raises(ConfigError, match=r"dataset demo .*0123.*4567.*--workdir.*00000002"):
        program.train(miniature.config(checkpoint=config_lib.Checkpoint(every_steps=2)), workdir)
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != BEST}
    assert before == after
    coloured()
    program.train(miniature.config(checkpoint=config_lib.Checkpoint(every_steps=2)), workdir)
    assert locate.find(workdir).meta["data"] == locate.find(trained).meta["data"]


def only(**changes) -> config_lib.Config:
    return miniature.config(checkpoint=config_lib.Checkpoint(every_steps=2), **changes)


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(trained, tmp_path, coloured, monkeypatch):
    coloured()
    workdir = again(trained, tmp_path, 2)
    real = loop.Meter.read

    def poisoned(self):
        if self.pending is not None and self.pending[0] == 4:
            self.pending = (4, {**self.pending[1], "loss": np.float32("nan")})
        real(self)

    monkeypatch.setattr(loop.Meter, "read", poisoned)
    with pytest.raises(TrainingError) as error:
        program.train(only(), workdir)
    last = workdir / "checkpoints" / "only" / "00000002"
    assert "the loss of step 4 is nan" in str(error.value) and f"the last good checkpoint is {last}" in str(error.value)
    assert "Lower optimizer.peak_lr" in str(error.value)
    assert locate.find(last).step == 2
    assert not (last.parent / "00000004").exists()  # what is not finite is never saved


@pytest.mark.slow
def test_a_huge_learning_rate_ends_in_that_sentence(tmp_path, coloured):
    coloured()
    process = miniature.process(optimizer=config_lib.Optimizer(peak_lr=1e30, clip=0.0), steps=6, eval_every=6)
    with pytest.raises(TrainingError, match=r"the loss of step [2-6] is (nan|inf) .*no checkpoint was saved"):
        program.train(miniature.config(processes={"only": process}), tmp_path / "run")


@pytest.mark.parametrize(("rate", "steps"), [
    (1e20, 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1e38, 1), (1e20, 3)))])
def test_weights_that_are_saved_are_judged_and_not_those_before_them(trained, tmp_path, coloured, rate, steps):
    """One step from good weights: its loss is finite, and what it leaves behind is not; at a validation, or without."""
    coloured()
    process = miniature.process(optimizer=config_lib.Optimizer(peak_lr=rate, clip=0.0), steps=steps, eval_every=0)
    with pytest.raises(TrainingError, match="after step 1"):
        program.train(miniature.config(processes={"only": process}, init=str(trained),
                                       checkpoint=config_lib.Checkpoint(every_steps=1)), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "only"
    assert not on_disk.folders(folder) and not (folder / "best.json").exists()


def test_a_best_of_nan_from_an_earlier_version_is_beaten(trained, tmp_path, coloured):
    coloured()
    workdir = again(trained, tmp_path, 2)
    folder = workdir / "checkpoints" / "only" / "00000002"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"best": float("nan")}))
    on_disk.write_marker(folder)
    program.train(only(), workdir)
    assert on_disk.best_step(folder.parent) == 4
    assert np.isfinite(locate.find(workdir).meta["best"])


def test_a_validation_of_which_nothing_can_be_judged_is_no_best_one(tmp_path, coloured):
    coloured(broken=range(32, 36))
    with pytest.raises(TrainingError, match="picture-3"):
        program.train(only(), tmp_path / "run")
    assert not on_disk.folders(tmp_path / "run" / "checkpoints" / "only")


def test_a_truncated_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(trained, tmp_path, coloured, caplog):
    coloured()
    workdir = again(trained, tmp_path, 2, 4)
    victim = workdir / "checkpoints" / "only" / "00000004" / "meta.json"
    victim.write_bytes(victim.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        program.train(only(), workdir)
    assert "00000004 is damaged: meta.json has 100 bytes instead of" in caplog.text
    steps = [record["step"] for record in logs.read(workdir / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_corrupt_picture_is_masked_counted_and_named_and_the_run_goes_on(trained, tmp_path, coloured, caplog):
    broken = rows_of(Coloured()).plan(0).examples[0].index  # a picture of the first batch
    coloured(broken=[broken])
    with caplog.at_level(logging.WARNING):
        program.train(only(), tmp_path / "run")
    assert f"skipped coloured/picture-{broken:02d}: /pictures/{broken:02d}.jpg is truncated" in caplog.text
    ours, theirs = (next(record for record in logs.read(where / "metrics.jsonl") if record["step"] == 1)
                    for where in (tmp_path / "run", trained))
    assert ours["bad"] == 1 and theirs["bad"] == 0
    assert ours["answers"] < theirs["answers"] and ours["tokens"] == theirs["tokens"]


def test_nothing_else_in_the_batch_shifts_when_a_picture_is_corrupt():
    sound = rows_of(Coloured())
    broken = sound.plan(0).examples[0].index
    harmed = rows_of(Coloured(broken=[broken]))
    assert [harmed.plan(number).examples for number in range(6)] == [
        sound.plan(number).examples for number in range(6)]
    for number in range(6):
        a, b = sound.row(number), harmed.row(number)
        hit = [place for place, example in enumerate(sound.plan(number).examples, 1) if example.index == broken]
        for name in ("tokens", "visual", "segments", "positions", "places", "labels"):
            assert np.array_equal(a[name], b[name]), name
        assert b["bad"] == len(hit)
        lost = np.isin(a["segments"][a["places"]], hit) & (a["weights"][:, 0] > 0)
        assert np.array_equal(b["weights"], np.where(lost[:, None], 0, a["weights"]))
        assert bool(hit) == bool(lost.any())
    assert harmed.bad == {f"coloured/picture-{broken:02d}": f"/pictures/{broken:02d}.jpg is truncated"}


def test_too_many_corrupt_pictures_stop_the_run(tmp_path, coloured, monkeypatch):
    coloured(broken=range(0, 32, 2))
    monkeypatch.setattr(loop, "MIN_EXAMPLES", 3)
    with pytest.raises(TrainingError, match=r"[0-9]+ of [0-9]+ examples could not be used, more than "
                       r"data.max_bad_share=0.01; the first is coloured/picture-[0-9]+: /pictures/[0-9]+.jpg is "
                       r"truncated"):
        program.train(only(), tmp_path / "run")


def test_a_dataset_of_which_nothing_fits_a_row_is_refused(tmp_path, coloured):
    coloured()
    process = miniature.process(row=config_lib.Row(tokens=40, images=2, answers=64))
    with pytest.raises(ConfigError, match=r"no record of 'coloured' \(train\) can be used; the first one, "
                       r"coloured/picture-[0-9]+: needs [0-9]+ tokens"):
        program.train(miniature.config(processes={"only": process}), tmp_path / "run")


def test_a_full_disk_during_training_keeps_what_was_saved(trained, tmp_path, coloured, monkeypatch):
    coloured()
    workdir = again(trained, tmp_path, 2)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(on_disk, "write_marker", full)
    with pytest.raises(CheckpointError, match=r"no space left for the checkpoint .*00000004; free some"):
        program.train(only(), workdir)
    monkeypatch.undo()
    assert locate.find(workdir).step == 2
    records = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 1
