"""Checkpoints that read weights of others: adapters that differ are merged, a base is its bytes and not its path."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, lineage, locate, on_disk, restore
from calm_jax.checkpoints.meta import BEST, NEEDED, Pin
from calm_jax.checkpoints.store import Checkpoints
from calm_jax.commands import train as program
from calm_jax.errors import CheckpointError
from calm_jax.models.parameters import Geometry
from calm_jax.text import chat as chat_lib
from calm_jax.text import tokenizers

OLD = config_lib.Lora(rank=2, alpha=3.0, targets=r"decoder/blocks/(q|down)|mfam/qformers/groups/blocks/0/cross/v")
NEW = config_lib.Lora(rank=3, alpha=6.0, targets=r"decoder/blocks/(q|v)", dropout=0.0)
FACTORS = {f"decoder/blocks/{layer}/lora/{factor}" for layer in "qv" for factor in "ab"}


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.delenv("CALM_BASE", raising=False)


def model(lora: config_lib.Lora, **changes) -> config_lib.Model:
    return dataclasses.replace(miniature.MODEL, lora=lora, **changes)


def values(folder) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in restore.model(folder).parameters.items()}


def with_merged(parameters: dict[str, np.ndarray], lora: config_lib.Lora) -> dict[str, np.ndarray]:
    """The parameters without adapters, in double precision."""
    merged = {path: leaf.astype(np.float64) for path, leaf in parameters.items() if "/lora/" not in path}
    for path in parameters:
        if path.endswith("/lora/a"):
            kernel = path.replace("lora/a", "kernel")
            b = parameters[path.replace("lora/a", "lora/b")].astype(np.float64)
            merged[kernel] = merged[kernel] + lora.alpha / lora.rank * parameters[path] @ b
    return merged


def personal(base, **changes) -> config_lib.Config:
    """Two steps in which adapters alone learn, from a base."""
    process = miniature.process(steps=2, eval_every=0, train=(r".*/lora/(a|b)",),
                                freeze=(r"encoder/.*", r"mfam/.*", r"decoder/(?!.*/lora/).*"))
    return miniature.config(init=str(base), model=model(NEW), processes={"only": process},
                            checkpoint=config_lib.Checkpoint(every_steps=1), **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `base`, a process with adapters, and `mine`, a workdir of other adapters that began from it."""
    folder = tmp_path_factory.mktemp("lineage")
    miniature.saved(folder / "base", lora=OLD)
    program.train(personal(folder / "base"), folder / "mine")
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """The same in a place of its own, where the base is not; only CALM_BASE leads to it."""
    shutil.copytree(trained / "mine", tmp_path / "mine")
    return tmp_path / "mine"


# ---- adapters that differ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [
    config_lib.Lora(rank=0), pytest.param(NEW, marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(OLD, alpha=4.0), marks=pytest.mark.slow), dataclasses.replace(OLD, rank=3),
    pytest.param(dataclasses.replace(OLD, targets=r"decoder/blocks/(q|k)"), marks=pytest.mark.slow)],
    ids=["none", "all", "alpha", "rank", "targets"])
def test_adapters_that_differ_are_merged_and_the_model_is_the_same(trained, lora):
    config = miniature.config(model=model(lora))
    before = values(trained / "base")
    mesh = sharding.make_mesh(config_lib.Mesh(fsdp=-1))
    shapes = Geometry.of(config.model).shapes
    layout = sharding.parameters(shapes, mesh)
    kept = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout[path]) for path, leaf in shapes.items()}
    saved = locate.find(trained / "base")
    after = restore.load(saved, Geometry.of(config.model), config, kept)
    assert after.keys() == shapes.keys() and all(after[path].sharding == layout[path] for path in after)
    for path, value in with_merged(before, OLD).items():
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    fresh = {path: np.asarray(leaf) for path, leaf in after.items() if "/lora/" in path}
    assert all((leaf == 0).all() == path.endswith("b") for path, leaf in fresh.items())
    (line,) = restore.changes(saved, config)
    assert str(saved.path) in line and "\n" not in line


@pytest.mark.parametrize("lora", [OLD, dataclasses.replace(OLD, dropout=0.5), dataclasses.replace(
    OLD, targets=OLD.targets.replace("(q|down)", "(down|q)"))], ids=["same", "dropout", "spelling"])
def test_adapters_that_do_not_differ_go_on(trained, lora):
    config, saved = miniature.config(model=model(lora)), locate.find(trained / "base")
    assert restore.changes(saved, config) == []
    where = restore.origins(saved, config)
    assert set(where.values()) == {restore.Held(saved.pin)}


def test_another_geometry_is_refused(trained):
    config = miniature.config(model=dataclasses.replace(
        model(NEW), decoder=dataclasses.replace(miniature.MODEL.decoder, rope_theta=5e5)))
    with pytest.raises(CheckpointError, match=r"another geometry: model\.decoder\.rope_theta"):
        restore.origins(locate.find(trained / "base"), config)


@pytest.mark.parametrize("where", ["held", "borrowed"])
def test_a_parameter_that_models_no_longer_have_is_refused_not_drawn_anew(tmp_path, where):
    """A layer was `mfam/thematic/kernel` once; under its new name nobody holds it."""
    saved = locate.find(miniature.saved(tmp_path / "now"))
    one, store = jax.sharding.SingleDeviceSharding(jax.devices()[0]), Checkpoints(tmp_path / "then",
                                                                                  config_lib.Checkpoint())
    wanted = {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=one) for path, shape in
              array_io.shapes(saved).items()}
    held = array_io.restore(saved, {"parameters": wanted})["parameters"]
    old = held.pop("mfam/thematic/project/kernel")
    borrowed = {"checkpoints": [], "parameters": {}}
    if where == "held":
        held["mfam/thematic/kernel"] = old
    else:
        borrowed["parameters"]["mfam/thematic/kernel"] = {"seed": 0}
    store.save(3, {"parameters": held, "optimizer": ()}, saved.meta | {"borrowed": borrowed})
    store.close()
    for read in (restore.model, lambda folder: restore.lazily(locate.find(folder))):
        with pytest.raises(CheckpointError, match="has the parameter mfam/thematic/kernel, which models do not have"):
            read(tmp_path / "then")


def test_a_head_that_is_left_out_is_said(tmp_path):
    saved = locate.find(miniature.saved(tmp_path, score_head=config_lib.ScoreHead(4)))
    (line,) = restore.changes(saved, miniature.config())
    assert "regression head" in line and str(saved.path) in line


def test_what_was_trained_on_merged_adapters_is_small_and_computes_the_same(trained):
    saved = locate.find(trained / "mine")
    assert array_io.shapes(saved).keys() == FACTORS  # the merged kernels are made again, not stored for each person
    merged, after = with_merged(values(trained / "base"), OLD), values(trained / "mine")
    assert after.keys() == merged.keys() | FACTORS
    for path, value in merged.items():
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    assert all(np.abs(after[path]).max() > 0 for path in FACTORS)  # they have learned
    lazily = restore.lazily(saved)  # what an export reads
    assert lazily.keys() == after.keys()
    for path, leaf in lazily.items():
        np.testing.assert_allclose(leaf.read(()), after[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_training_resumes_on_merged_adapters(trained, tmp_path):
    workdir = tmp_path / "mine"
    shutil.copytree(trained / "mine", workdir)
    newest = on_disk.folders(workdir / "checkpoints" / "only")[-1]
    shutil.rmtree(newest)
    (newest.parent / BEST).unlink()
    program.train(personal(trained / "base"), workdir)
    before, after = values(trained / "mine"), values(workdir)
    assert locate.find(workdir).step == 2
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


def test_merged_adapters_below_merged_adapters(trained, tmp_path):
    """A third model without adapters, from the second: its kernels are the first's with both of them."""
    config = miniature.config(model=model(config_lib.Lora()))
    saved = locate.find(trained / "mine")
    expected = with_merged(values(trained / "mine"), NEW)
    where = restore.origins(saved, config)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = restore.read(where, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
                                 for path, leaf in Geometry.of(config.model).shapes.items()}, config.model, saved)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    # Written down and read again, it is the same.
    kept = {"decoder/norm/scale": np.full(32, 3.0, np.float32)}
    store = Checkpoints(tmp_path / "third", config_lib.Checkpoint())
    store.save(1, {"parameters": kept, "optimizer": ()}, {
        "process": "only", "base": dataclasses.asdict(saved.pin), "borrowed": restore.borrowed(where, kept), "seed": 9,
        "trained": sorted(kept),
        "config": dataclasses.asdict(config), "tokenizer": saved.meta["tokenizer"]})
    store.close()
    third = values(tmp_path / "third")
    for path, value in (expected | kept).items():
        np.testing.assert_allclose(third[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_adapters_on_kernels_that_were_never_saved(tmp_path):
    """From nothing, one factor of each adapter learns: both are held, and merged into the kernels of the seed."""
    process = miniature.process(steps=1, eval_every=0, optimizer=config_lib.Optimizer(peak_lr=0.3, warmup=0.0),
                                train=(r".*/lora/b",), freeze=(r"(?!.*/lora/b).*",))
    program.train(miniature.config(model=model(OLD), processes={"only": process}, seed=3), tmp_path / "run")
    saved, before = locate.find(tmp_path / "run"), values(tmp_path / "run")
    assert array_io.shapes(saved).keys() == {path for path in before if "/lora/" in path}
    assert any(before[path].any() for path in before if path.endswith("/lora/b"))
    config = miniature.config(model=model(config_lib.Lora()), seed=4)
    where = restore.origins(saved, config)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    after = restore.read(where, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in
                                 Geometry.of(config.model).shapes.items()}, config.model, saved)
    store, held = Checkpoints(tmp_path / "next", config_lib.Checkpoint()), {"decoder/norm/scale": np.ones(32)}
    store.save(1, {"parameters": held, "optimizer": ()}, {
        "process": "only", "base": dataclasses.asdict(saved.pin), "borrowed": restore.borrowed(where, held), "seed": 4,
        "trained": sorted(held),
        "config": dataclasses.asdict(config), "tokenizer": saved.meta["tokenizer"]})
    store.close()
    lazily = restore.lazily(locate.find(tmp_path / "next"))
    for path, value in with_merged(before, OLD).items():
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(lazily[path].read(()), value, rtol=1e-5, atol=1e-6, err_msg=path)


# ---- a base is its bytes ----------------------------------------------------------------------------------------


def again(folder, step: int, scale: float = 2.0, keep: int = 1) -> None:
    """A later checkpoint of `folder`, as training that goes on there saves it: other weights."""
    saved = locate.find(folder)
    held = array_io.stored(saved)
    store = Checkpoints(folder, config_lib.Checkpoint(keep=keep))
    store.save(step, {"parameters": {path: scale * leaf.read().result() for path, leaf in held.items()},
                      "optimizer": ()}, {name: value for name, value in saved.meta.items() if name != "step"})
    store.close()


def test_a_base_that_is_trained_further_stays_and_changes_nothing(trained, tmp_path, monkeypatch):
    """`meta.json` names the very checkpoint, absolutely, and training does not prune it."""
    shutil.copytree(trained / "base", tmp_path / "base", ignore=shutil.ignore_patterns(NEEDED))
    monkeypatch.chdir(tmp_path)
    program.train(personal("base"), tmp_path / "mine")  # a relative path
    monkeypatch.chdir("/")
    saved = locate.find(tmp_path / "mine")
    pin = Pin(**saved.meta["base"])
    assert pin.path == str((tmp_path / "base" / "00000003").resolve()) and pin.step == 3
    before, identity = values(tmp_path / "mine"), lineage.identity(saved)
    for step in (4, 5, 6):
        again(tmp_path / "base", step)
    assert [path.name for path in on_disk.folders(tmp_path / "base")] == ["00000003", "00000006"]
    after = values(tmp_path / "mine")
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, path)
    assert lineage.identity(locate.find(tmp_path / "mine")) == identity
    shutil.rmtree(tmp_path / "mine")  # nobody needs it any more
    again(tmp_path / "base", 7)
    assert [path.name for path in on_disk.folders(tmp_path / "base")] == ["00000007"]


def test_another_base_in_the_same_place_is_refused(trained, tmp_path):
    shutil.copytree(trained / "mine", tmp_path / "mine")
    pin = Pin(**locate.find(trained / "mine").meta["base"])
    again_at = tmp_path / "again"
    shutil.copytree(trained / "base", again_at)
    moved = trained / "aside"
    os.rename(trained / "base", moved)
    try:
        with pytest.raises(CheckpointError, match=f"{re.escape(str(pin))}.*CALM_BASE"):
            restore.model(tmp_path / "mine")
        again(again_at, 4)
        shutil.copytree(again_at / "00000004", trained / "base" / "00000003")
        other = on_disk.digest_of(trained / "base" / "00000003")
        with pytest.raises(CheckpointError, match=f"{pin.digest[:12]}.*{other[:12]}.*CALM_BASE"):
            restore.model(tmp_path / "mine")
    finally:
        shutil.rmtree(trained / "base", ignore_errors=True)
        os.rename(moved, trained / "base")


def test_a_base_that_was_moved_is_named_again(trained, copied, tmp_path, monkeypatch):
    before = values(copied)
    shutil.copytree(trained / "base", tmp_path / "other")
    moved = trained / "aside"
    os.rename(trained / "base", moved)
    try:
        (tmp_path / "runs" / "base" / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / "base" / "checkpoints" / "only").symlink_to(tmp_path / "other")
        for folder in (tmp_path / "other", tmp_path / "other" / "00000003", tmp_path / "runs", tmp_path / "runs/base"):
            monkeypatch.setenv("CALM_BASE", f"{tmp_path / 'nothing'}{os.pathsep}{folder}")
            found = values(copied)
            for path, value in before.items():
                np.testing.assert_array_equal(found[path], value, path)
        again(tmp_path / "other", 4)
        monkeypatch.setenv("CALM_BASE", str(tmp_path / "other" / "00000004"))
        with pytest.raises(CheckpointError, match=r"is not in CALM_BASE=.*00000004"):
            restore.model(copied)
    finally:
        os.rename(moved, trained / "base")


def test_ancestors_that_hold_nothing_that_is_needed_may_be_gone(tmp_path):
    """A whole model, one that trained some of it, one that trained the same again; the middle one holds nothing that
    the last one lacks, and what neither trained is the first one's."""
    def next_one(name, base, seed):
        config = miniature.config(init=base, seed=seed)
        before = locate.find(base) if base else None
        where = restore.origins(before, config)
        held = {"decoder/norm/scale": np.full(32, float(seed), np.float32)}
        store = Checkpoints(tmp_path / name, config_lib.Checkpoint())
        store.save(1, {"parameters": held, "optimizer": ()}, {
            "process": "only", "base": dataclasses.asdict(before.pin) if before else "", "seed": seed,
            "borrowed": restore.borrowed(where, held), "config": dataclasses.asdict(config), "trained": sorted(held),
            "tokenizer": chat_lib.load().tokenizer.fingerprint})
        store.close()
        return str(tmp_path / name)

    first = next_one("first", "", 5)
    third = next_one("third", next_one("second", first, 6), 7)
    before = values(third)
    shutil.rmtree(tmp_path / "first")  # what it did not train is drawn from its seed
    shutil.rmtree(tmp_path / "second")
    for path, value in values(third).items():
        np.testing.assert_array_equal(value, before[path], path)
    assert (before["decoder/norm/scale"] == 7).all()


def test_the_identity_of_a_checkpoint_changes_with_any_weight_that_is_read(trained, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "base")
    identities = [lineage.identity(locate.find(tmp_path / "base"))]
    stat = (tmp_path / "base" / "00000003" / "meta.json").stat()
    again(tmp_path / "base", 4)
    shutil.rmtree(tmp_path / "base" / "00000003", ignore_errors=True)
    os.rename(tmp_path / "base" / "00000004", tmp_path / "base" / "00000003")
    os.utime(tmp_path / "base" / "00000003" / "meta.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    identities.append(lineage.identity(locate.find(tmp_path / "base")))
    assert identities[0]["digest"] != identities[1]["digest"]
    json.dumps(identities)


# ---- checkpoints of before: the base is a path --------------------------------------------------------------------


def old_style(folder, base: str) -> str:
    kept = {"decoder/norm/scale": np.full(32, 3.0, np.float32)}
    store = Checkpoints(folder, config_lib.Checkpoint())
    store.save(1, {"parameters": kept, "optimizer": ()}, {
        "process": "only", "base": base, "seed": 0, "config": dataclasses.asdict(miniature.config(init=base)),
        "trained": sorted(kept), "tokenizer": chat_lib.load().tokenizer.fingerprint})
    store.close()
    return str(folder)


def test_a_base_named_by_its_path_alone_is_read_while_only_one_can_be_meant(tmp_path):
    base = miniature.saved(tmp_path / "base")
    mine = old_style(tmp_path / "mine", base)
    whole, identity = values(mine), lineage.identity(locate.find(mine))
    np.testing.assert_array_equal(whole["decoder/embedding"], values(base)["decoder/embedding"])
    again(tmp_path / "base", 4, keep=2)
    with pytest.raises(CheckpointError, match=f"{re.escape(base)}.*leave only the one"):
        restore.model(mine)
    shutil.rmtree(tmp_path / "base" / "00000003")
    with pytest.raises(CheckpointError, match="younger"):
        restore.model(mine)
    assert lineage.identity(locate.find(mine)) != identity
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"{re.escape(base)}.*bring it back"):
        restore.model(mine)


def test_a_checkpoint_carries_the_tokenizer_that_it_was_trained_with(tmp_path, monkeypatch):
    """Named by a relative path, and gone later: whoever asks the model from elsewhere needs neither."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(tokenizers.SHIPPED, "own.model")
    process = dataclasses.replace(miniature.process(), steps=1, eval_every=0)
    program.train(miniature.config(tokenizer="own.model", processes={"only": process}), tmp_path / "run")
    Path("own.model").unlink()
    saved = locate.find(tmp_path / "run")
    assert (saved.path / "tokenizer.model").read_bytes() == tokenizers.SHIPPED.read_bytes()
    assert restore.chat(saved).tokenizer.name == str(saved.path / "tokenizer.model")
