"""Checkpoints as files: chunks that eight readers can share, what is kept, and a sentence for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, locate, on_disk, restore
from calm_jax.checkpoints import store as store_lib
from calm_jax.checkpoints.meta import ARRAYS, MARKER, Saved
from calm_jax.checkpoints.store import Checkpoints
from calm_jax.errors import CheckpointError
from calm_jax.models.parameters import Geometry, initial

META = {"process": "only", "best": None, "base": "", "seed": 0, "config": {}, "tokenizer": "", "trained": []}


def arrays(scale: float = 1.0) -> dict:
    return {"parameters": {"a/kernel": jnp.full((4, 3), scale), "a/bias": jnp.arange(3.0)},
            "optimizer": (jnp.asarray(7), {"a/kernel": jnp.full((4, 3), 2 * scale)})}


@pytest.fixture
def store(tmp_path):
    made = Checkpoints(tmp_path / "only", config_lib.Checkpoint(keep=2))
    yield made
    made.close()


def save(store, step: int, **options) -> Saved:
    store.save(step, arrays(step), META, **options)
    store.wait()
    return on_disk.read(store.folder / f"{step:08d}")


def abstract(tree):
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=single), tree)


def steps(store) -> list[int]:
    return [int(path.name) for path in on_disk.folders(store.folder)]


# ---- what is written is read ------------------------------------------------------------------------------------


def test_what_is_saved_is_restored_whole_or_in_parts(store):
    saved = save(store, 3)
    assert saved.step == 3 and saved.meta["process"] == "only" and "version" in saved.meta
    whole = array_io.restore(saved, abstract(arrays()))
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(arrays(3.0)), strict=True):
        assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    some = array_io.restore(saved, {"parameters": {"a/bias": abstract(arrays())["parameters"]["a/bias"]}})
    assert list(some["parameters"]) == ["a/bias"] and "optimizer" not in some
    state = array_io.restore(saved, {"parameters": {}, "optimizer": abstract(arrays()["optimizer"])})
    assert state["parameters"] == {} and int(state["optimizer"][0]) == 7
    assert array_io.restore(saved, {"parameters": {}}) == {"parameters": {}}
    assert array_io.shapes(saved) == {"a/kernel": (4, 3), "a/bias": (3,)}


def test_what_two_runs_in_a_row_kept_frozen_is_drawn_from_the_first_seed(tmp_path):
    config = miniature.config(seed=5)
    geometry = Geometry.of(config.model)
    drawn = initial(config.model, jax.random.key(5))
    learned = {path: value + 1 for path, value in drawn.items() if not path.startswith("encoder/")}
    base = ""
    for number, seed in enumerate((5, 6)):  # the second one holds nothing that the first one lacks
        store = Checkpoints(tmp_path / str(number), config_lib.Checkpoint())
        store.save(1, {"parameters": learned, "optimizer": ()},
                   META | {"base": base, "seed": seed, "config": dataclasses.asdict(config)})
        store.close()
        base = str(tmp_path / str(number) / "00000001")
    found = restore.load(locate.find(base), geometry, config, abstract(geometry.shapes))
    assert found.keys() == drawn.keys()
    for path, value in found.items():
        np.testing.assert_allclose(value, learned.get(path, drawn[path]), rtol=1e-5, atol=1e-6, err_msg=path)


def test_another_model_is_refused_by_name_and_shape(store):
    saved, single = save(store, 3), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=single)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"a/kernel is \[4, 3\] in the checkpoint .*00000003 and "
                       r"\[4, 5\] in this config; use the config it was trained with"):
        array_io.restore(saved, {"parameters": {"a/kernel": leaf(4, 5)}})
    with pytest.raises(CheckpointError, match=r"does not hold b/kernel: it is of another model"):
        array_io.restore(saved, {"parameters": {"b/kernel": leaf(4, 3)}})


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint in .*absent; give a"):
        locate.find(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged; the folder is no usable workdir"):
        locate.find(tmp_path)


# ---- what is kept -----------------------------------------------------------------------------------------------


def test_the_newest_the_best_and_the_multiples_are_kept(store):
    store.policy = dataclasses.replace(store.policy, keep=2, keep_every_steps=4)
    for step in range(1, 10):
        save(store, step, best=step == 3)
    assert steps(store) == [3, 4, 8, 9] and on_disk.best_step(store.folder) == 3
    save(store, 10, best=True)
    assert steps(store) == [4, 8, 9, 10]  # the best before is let go only when the better one is complete
    assert locate.find(store.folder).step == 10


def test_at_least_one_is_kept(store):
    store.policy = dataclasses.replace(store.policy, keep=0)
    for step in (1, 2):
        save(store, step)
    assert steps(store) == [2]


def test_the_best_is_found_first_and_the_newest_resumed(store):
    save(store, 1, best=True)
    save(store, 2)
    assert locate.find(store.folder).step == 1 and store.latest().step == 2


def test_saving_a_step_again_replaces_nothing_that_is_complete(store):
    first = save(store, 1)
    store.save(1, arrays(9.0), META, best=True)
    store.wait()
    assert on_disk.read(first.path).meta == first.meta and on_disk.best_step(store.folder) == 1


@pytest.mark.parametrize("policy", [config_lib.Checkpoint(every_steps=3, every_minutes=0)])
def test_checkpoints_are_due_by_steps_or_minutes(tmp_path, policy, monkeypatch):
    store = Checkpoints(tmp_path, policy)
    assert [step for step in range(1, 10) if store.due(step)] == [3, 6, 9]
    store.policy = config_lib.Checkpoint(every_steps=0, every_minutes=5)
    now = store_lib.time.monotonic()
    monkeypatch.setattr(store_lib.time, "monotonic", lambda: now + 301)
    assert store.due(1)
    store.close()


# ---- what is unfinished -----------------------------------------------------------------------------------------


def test_an_unfinished_folder_is_ignored_by_readers_and_removed_on_resumption(store):
    save(store, 1)
    half = store.folder / "00000002"
    (half / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    assert locate.find(store.folder).step == 1
    assert store.latest().step == 1
    assert steps(store) == [1]


def test_what_a_crash_left_half_pruned_is_removed_by_the_next_save(store):
    (store.folder / "00000001" / "arrays").mkdir(parents=True)  # its marker went first
    save(store, 5)
    assert steps(store) == [5]


def test_an_unfinished_folder_of_the_same_step_is_written_anew(store):
    (store.folder / "00000005" / "arrays").mkdir(parents=True)
    assert save(store, 5).step == 5


# ---- readers beside a training that prunes -----------------------------------------------------------------------


def test_what_is_pruned_while_it_is_verified_is_looked_for_again(store, monkeypatch):
    save(store, 1)
    checksum, store.policy = on_disk.files.sha256, config_lib.Checkpoint(keep=1)
    gone = []

    def meanwhile(file):
        if file.is_relative_to(store.folder / "00000001") and not gone:
            gone.append(file)
            save(store, 2)
            shutil.rmtree(store.folder / "00000001")  # from a file system without locks
        return checksum(file)

    monkeypatch.setattr(on_disk.files, "sha256", meanwhile)
    assert locate.find(store.folder).step == 2
    with pytest.raises(CheckpointError, match="00000001") as error:  # asked for by its own name: it is gone
        locate.find(store.folder / "00000001")
    assert "\n" not in str(error.value)


def test_pruning_waits_for_readers(store):
    """What somebody reads is not pruned; the next time it is."""
    store.policy = config_lib.Checkpoint(keep=1)
    first = save(store, 1)
    with on_disk.reading(first):
        save(store, 2)
        assert steps(store) == [1, 2] and on_disk.read(first.path).step == 1
    save(store, 3)
    assert steps(store) == [3]


def test_what_is_pruned_or_replaced_before_it_is_read_is_one_sentence(store):
    saved = save(store, 1)
    want = abstract(arrays())
    (saved.path / MARKER).unlink()  # pruned in part
    for call in (lambda: array_io.restore(saved, want), lambda: array_io.shapes(saved),
                 lambda: array_io.stored(saved)):
        with pytest.raises(on_disk.Vanished, match="00000001 was removed or replaced while it was read"):
            call()
    save(store, 1)  # another training, in the same place
    saved = dataclasses.replace(saved, digest="0" * 64)
    with pytest.raises(on_disk.Vanished):
        array_io.restore(saved, want)


def test_a_model_is_read_from_the_checkpoint_that_is_there(tmp_path, monkeypatch):
    """Pruned after it was found, in the middle of its arrays: the newer one is taken, whole."""
    folder = pathlib.Path(miniature.saved(tmp_path / "run"))
    read, met = array_io.restore, []

    def meanwhile(saved, *rest):
        if saved.step == 3:
            met.append(saved)
            if not (folder / "00000007").exists():
                shutil.copytree(saved.path, folder / "00000007")
                meta = json.loads((saved.path / "meta.json").read_text())
                (folder / "00000007" / "meta.json").write_text(json.dumps(meta | {"step": 7}))
                on_disk.write_marker(folder / "00000007")
            shutil.rmtree(saved.path / "arrays")
            (saved.path / MARKER).unlink()
        return read(saved, *rest)

    monkeypatch.setattr(array_io, "restore", meanwhile)
    assert restore.model(folder).saved.step == 7 and len(met) == 1


def test_pruning_survives_what_it_cannot_remove(store, monkeypatch):
    """A reader on a network file system keeps files in a folder alive, or somebody was quicker."""
    remove = store_lib.shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        if str(path).endswith("00000001"):
            return
        remove(path, ignore_errors=True)

    monkeypatch.setattr(store_lib.shutil, "rmtree", busy)
    for step in (1, 2, 3, 4):
        if step == 4:
            remove(store.folder / "00000002")
        save(store, step)
    assert locate.find(store.folder).step == 4
    monkeypatch.undo()
    save(store, 5)
    assert steps(store) == [4, 5]


# ---- a full disk ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_harms_nothing(store, monkeypatch):
    save(store, 1)
    write = on_disk.write_json

    def full(path, value):
        if path.name == MARKER:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    monkeypatch.setattr(on_disk, "write_json", full)
    store.save(2, arrays(), META)
    with pytest.raises(CheckpointError, match=r"no space left for the checkpoint .*00000002; free some "
                       "space and run the same command again: it resumes from the last complete checkpoint"):
        store.wait()
    monkeypatch.undo()
    assert store.latest().step == 1 and steps(store) == [1]
    assert save(store, 2).step == 2  # and once there is space, saving goes on


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_disk_that_fills_while_orbax_writes_is_the_same_sentence(store, monkeypatch, where):
    save(store, 1)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device\nmore lines")

    monkeypatch.setattr(store._orbax, where, full)
    with pytest.raises(CheckpointError, match=r"no space left for the checkpoint .*00000002") as error:
        store.save(2, arrays(), META)
        store.wait()
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    store._orbax.wait_until_finished()
    assert store.latest().step == 1


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    store = Checkpoints(tmp_path / "file" / "only", config_lib.Checkpoint())
    with pytest.raises(CheckpointError, match=r"could not be saved: .*Not a directory"):
        store.save(1, arrays(), META)
    store.close()


# ---- chunks -----------------------------------------------------------------------------------------------------


def chunk_shapes(saved: Saved) -> dict[str, tuple[int, ...]]:
    """path -> shape of a stored chunk, from the arrays' own descriptions."""
    metadata = json.loads((saved.path / ARRAYS / "array_metadatas" / "process_0").read_text())
    return {entry["array_metadata"]["param_name"]: tuple(entry["array_metadata"]["chunk_shape"])
            for entry in metadata["array_metadatas"]}


def touched(shape, chunk, axis: int, parts: int = 8) -> float:
    """What a reader of one of `parts` parts along `axis` reads, as a multiple of its share; the worst of the parts."""
    worst = 0.0
    for part in range(parts):
        start, stop = part * shape[axis] // parts, (part + 1) * shape[axis] // parts
        first, last = start // chunk[axis], -(-stop // chunk[axis])
        worst = max(worst, (min(last * chunk[axis], shape[axis]) - first * chunk[axis]) / (stop - start))
    return worst


@pytest.mark.parametrize("shape", [(4, 2048, 2048), (4, 576, 576)])
def test_a_large_leaf_is_stored_in_tiles_of_one_layer_that_eight_readers_share(tmp_path, caplog, shape):
    store = Checkpoints(tmp_path / "only", config_lib.Checkpoint())
    value = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    store.save(1, {"parameters": {"x/kernel": jnp.asarray(value)}, "optimizer": ()}, META)
    store.close()
    assert "target_byte_size" not in caplog.text  # nothing that a user could mend
    saved = on_disk.read(tmp_path / "only" / "00000001")
    chunk = next(chunk for name, chunk in chunk_shapes(saved).items() if "kernel" in name)
    print(f"{shape} is stored in chunks of {chunk}: {math.prod(chunk) * 4 / 2**20:.2f} MiB")
    assert chunk[0] == 1
    assert max(touched(shape, chunk, 1), touched(shape, chunk, 2)) <= 1.1
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=single)
    restored = array_io.restore(saved, {"parameters": {"x/kernel": leaf}})
    assert np.array_equal(restored["parameters"]["x/kernel"], value)


def test_the_stacked_matrices_of_7b_are_shared_by_eight_readers_whatever_their_mesh():
    """By Orbax's own arithmetic: written whole, read along either axis; written in eight parts, read by the same."""
    from orbax.checkpoint._src.arrays import subchunking
    mesh = jax.sharding.AbstractMesh((1, 8, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shapes = Geometry.of(config_lib.model("7b")).shapes
    layout, checked = sharding.parameters(shapes, mesh), 0
    for path, leaf in shapes.items():
        if leaf.ndim < 3 or leaf.size * 4 < array_io.LARGE:
            continue
        options = array_io.chunks(leaf)
        part = layout[path].shard_shape(leaf.shape)
        for written in (leaf.shape, part):
            chunk = subchunking.choose_chunk_shape(leaf.shape, written, leaf.dtype, options.chunk_byte_size,
                                                   shard_axes=options.shard_axes)
            assert math.prod(chunk[:-2]) == 1, (path, chunk)
            for axis in (leaf.ndim - 2, leaf.ndim - 1):
                if leaf.shape[axis] % 8 == 0 and (written == leaf.shape or part[axis] < leaf.shape[axis]):
                    assert touched(leaf.shape, chunk, axis) <= 1.1, (path, leaf.shape, chunk, axis)
        checked += 1
    assert checked > 15


def test_names_are_nested_and_flattened_without_loss():
    flat = {"a/b/kernel": 1, "a/b/bias": 2, "c": 3}
    assert array_io.unnest(array_io.nest(flat)) == flat
    assert array_io.nest(flat) == {"a": {"b": {"kernel": 1, "bias": 2}}, "c": 3}
