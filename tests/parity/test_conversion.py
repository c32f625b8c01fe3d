"""tools.convert_from_hf on real Hugging Face folders of transformers: bit for bit, streamed, or one sentence."""

import dataclasses
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time

import jax
import miniature
import ml_dtypes
import numpy as np
import pytest
import transformers

from calm_jax import config as config_lib
from calm_jax import json_files, sharding
from calm_jax.checkpoints import array_io, locate, restore
from calm_jax.checkpoints.meta import ARRAYS
from calm_jax.convert import families, hf_import, mfam, tables, torch_files
from calm_jax.convert.families import clip
from calm_jax.convert.families import llama as llama_family
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.text.tokenizers import SHIPPED
from calm_jax.training import workdir
from tools.bench import conversion as bench_conversion

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
safetensors_torch = pytest.importorskip("safetensors.torch")
ROOT = pathlib.Path(__file__).resolve().parents[2]
QUERY_BRANCH = (r"query_tokens|(ln_vision|llm_proj|Qformer\.bert\.embeddings\.LayerNorm)\..*|"
                r"Qformer\.bert\.encoder\.layer\.\d+\.(attention|crossattention|intermediate_query|output_query)\..*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def vit():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=40))


def llama(vocab=2048):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=512, rms_norm_eps=1e-5))


def qformer(context=24):
    return transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=context,
        cross_attention_frequency=2))


def write(model, folder, form, dtype="float32"):
    """A folder as the hub has it: `safetensors`, `bin`, and both in shards."""
    model = model.to(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    if form.startswith("safetensors"):
        model.save_pretrained(folder, max_shard_size="20KB" if form.endswith("sharded") else "1GB")
        assert (folder / "model.safetensors.index.json").is_file() == form.endswith("sharded")
        return folder
    model.config.save_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = list(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for shard, mine in shards.items():
        torch.save({name: state[name] for name in mine}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: shard for shard, mine in shards.items() for name in mine}}))
    return folder


def parts(folder, form="safetensors", dtype="float32", **sizes):
    torch.manual_seed(0)
    write(vit(), folder / "vit", form, dtype)
    write(llama(**sizes), folder / "llm", form, dtype)
    shutil.copyfile(SHIPPED, folder / "llm" / "tokenizer.model")
    return [str(folder / "vit"), str(folder / "llm")]


def with_queries(folder, context=24, form="safetensors"):
    """A Q-Former's folder as Blip2ForConditionalGeneration writes it: queries and geometry of the whole beside it."""
    write(qformer(context), folder, form)
    state = dict(safetensors_torch.load_file(folder / "model.safetensors"))
    state["query_tokens"] = torch.randn(1, 6, 16)
    safetensors_torch.save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "blip-2", "num_query_tokens": 6, "qformer_config": config}))
    return str(folder)


def lavis(context=24, width=128, depth=4, mlp=96, every=2, queries=6, out=32):
    """The state of a BLIP-2 model as LAVIS names it, text branch, heads and parts of its neighbours included."""
    state = {"query_tokens": torch.randn(1, queries, width)}

    def linear(name, into, of):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(into, of), torch.randn(into)

    def norm(name, size):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(size), torch.randn(size)

    norm("ln_vision", context)
    linear("llm_proj", out, width)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(7)[None]
    state["Qformer.bert.embeddings.word_embeddings.weight"] = torch.randn(11, width)
    norm("Qformer.bert.embeddings.LayerNorm", width)
    for n in range(depth):
        block = f"Qformer.bert.encoder.layer.{n}"
        for kind, of in (("attention", width), ("crossattention", context))[: 1 if n % every else 2]:
            for part, size in (("query", width), ("key", of), ("value", of)):
                linear(f"{block}.{kind}.self.{part}", width, size)
            linear(f"{block}.{kind}.output.dense", width, width)
            norm(f"{block}.{kind}.output.LayerNorm", width)
        for branch in ("", "_query"):
            linear(f"{block}.intermediate{branch}.dense", mlp, width)
            linear(f"{block}.output{branch}.dense", width, mlp)
            norm(f"{block}.output{branch}.LayerNorm", width)
    linear("Qformer.cls.predictions.transform.dense", width, width)
    linear("itm_head", 2, width)
    state["temp"] = torch.tensor(0.07)
    state["visual_encoder.cls_token"] = torch.randn(1, 1, context)
    return state


def values(path):
    saved = locate.find(path)
    model = config_lib.from_config_dict(saved.meta["config"]).model
    shapes, held = Geometry.of(model).shapes, array_io.shapes(saved)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(shapes[name].shape, stored(saved, name), sharding=one) for name in held}
    return model, {name: np.asarray(leaf) for name, leaf in
                   array_io.restore(saved, {"parameters": wanted})["parameters"].items()}


def stored(saved, name):
    import orbax.checkpoint as ocp
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        return array_io.unnest(orbax.metadata(saved.path / ARRAYS).item_metadata.tree["parameters"]
                               )[name].dtype


def bits(array):
    return np.asarray(array).view(f"u{np.asarray(array).dtype.itemsize}")


@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "bfloat16"), ("safetensors sharded", "float16"),
                                             ("bin", "float32"), ("bin sharded", "bfloat16")])
def test_every_tensor_arrives_bit_for_bit(tmp_path, monkeypatch, form, dtype):
    if form == "safetensors":  # leaves of real size are written in pieces; here that size is made small
        monkeypatch.setattr(array_io, "LARGE", 1 << 9)
    sources = parts(tmp_path, form, dtype)
    out = hf_import.convert(*sources, [], str(tmp_path / "out"))
    assert not list(tmp_path.glob("*.partial"))
    model, leaves = values(out)
    assert (model.encoder.depth, model.decoder.kv_heads, model.decoder.vocab) == (4, 2, 2048)
    for prefix, table in (("encoder/", clip.table(model.encoder)), ("decoder/", llama_family.table(model.decoder))):
        mine = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
        back = tables.to_torch(table, mine)
        folder = tmp_path / ("vit" if prefix == "encoder/" else "llm")
        truth = torch_files.tensors(folder)
        for name, tensor in truth.items():
            key = name.removeprefix("vision_model.")
            if "post_layernorm" in key or "position_ids" in key:
                continue
            assert back[key].dtype == tensor.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
            np.testing.assert_array_equal(bits(back[key]), bits(tensor.read()), name)


def test_word_embeddings_that_are_no_numbers_are_kept_and_said(tmp_path):
    sources, said = parts(tmp_path), []
    place = tmp_path / "llm" / "model.safetensors"
    tensors = safetensors_torch.load_file(place)
    tensors["model.embed_tokens.weight"][3, 4] = float("nan")
    safetensors_torch.save_file(tensors, place, {"format": "pt"})
    model, leaves = values(hf_import.convert(*sources, [], str(tmp_path / "out"), say=said.append))
    assert model.visual_rms == 0 and any("word embeddings is nan" in line for line in said)
    np.testing.assert_array_equal(bits(leaves["decoder/embedding"]),
                                  bits(tensors["model.embed_tokens.weight"].numpy()))


def test_what_a_conversion_does_not_hold_is_the_recipes_to_choose(tmp_path):
    out = hf_import.convert(*parts(tmp_path), [], str(tmp_path / "out"), seed=3)
    saved, words = locate.find(out), torch_files.tensors(tmp_path / "llm")["model.embed_tokens.weight"].read()
    model = saved.config.model
    rms = np.sqrt(np.square(words.astype(np.float64)).mean())
    assert abs(model.visual_rms - rms) <= 5e-4 * rms
    recipe = dataclasses.replace(model, encoder=model.encoder.resized(21),
                                 qformer=dataclasses.replace(model.qformer, width=24, heads=2, depth=2),
                                 thematic=config_lib.Thematic(pool=1, norm=True), visual_rms=0.0)
    config = config_lib.Config(seed=7, init=str(out), model=recipe)
    settled = workdir.settled(tmp_path / "run", config)
    assert settled == dataclasses.replace(config, model=dataclasses.replace(recipe, visual_rms=model.visual_rms))
    mine = dataclasses.replace(config, model=dataclasses.replace(recipe, visual_rms=0.5))
    assert workdir.settled(tmp_path / "run", mine) == mine
    workdir.claim(tmp_path / "run", settled)
    found = restore.origins(saved, settled)
    assert {path for path, origin in found.items() if origin == restore.Drawn(7)} == {
        path for path in found if path.startswith("mfam/")}
    assert {origin.by for origin in found.values() if isinstance(origin, restore.Held)} == {saved.pin}
    shutil.rmtree(out)  # a run that has begun needs no other place to know its own scale
    assert workdir.settled(tmp_path / "run", config) == settled


@pytest.mark.parametrize("context", [24, 20])
def test_one_qformer_serves_all_levels_and_what_does_not_fit_is_left_and_said(tmp_path, context):
    sources, said = parts(tmp_path), []
    folder = with_queries(tmp_path / "qformer", context)
    out = hf_import.convert(*sources, [folder], str(tmp_path / "out"), say=said.append)
    model, leaves = values(out)
    assert (model.qformer.queries, model.qformer.width, model.qformer.cross_every) == (6, 16, 2)
    truth = torch_files.tensors(tmp_path / "qformer")
    queries = leaves["mfam/qformers/queries"]
    for level in range(3):
        np.testing.assert_array_equal(queries[level], truth["query_tokens"].read()[0])
    fits = context == 24
    assert any("cross-attention" in line for line in said) != fits
    assert ("mfam/qformers/groups/blocks/0/cross/k/kernel" in leaves) == fits
    assert "mfam/qformers/groups/blocks/0/cross/q/kernel" in leaves
    assert "mfam/qformers/project/kernel" not in leaves and any("projection" in line for line in said)
    assert "left to random numbers: mfam/thematic" in said


def test_three_qformers_are_low_middle_and_high(tmp_path):
    sources = parts(tmp_path)
    folders = [with_queries(tmp_path / name) for name in config_lib.LEVELS]
    _, leaves = values(hf_import.convert(*sources, folders, str(tmp_path / "out")))
    for level, name in enumerate(config_lib.LEVELS):
        truth = torch_files.tensors(tmp_path / name)["query_tokens"].read()[0]
        np.testing.assert_array_equal(leaves["mfam/qformers/queries"][level], truth)
    with pytest.raises(ConfigError, match="one Q-Former for all levels or three, not 2"):
        hf_import.convert(*sources, folders[:2], str(tmp_path / "other"))


@pytest.mark.parametrize(("context", "dtype"), [(24, "float16"), (20, "float32")])
def test_a_lavis_file_alone_gives_all_levels_bit_for_bit(tmp_path, context, dtype):
    sources, said = parts(tmp_path), []
    state = {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
             for name, tensor in lavis(context).items()}
    file = tmp_path / "downloads" / "blip2_pretrained.pth"
    file.parent.mkdir()
    torch.save({"model": state, "optimizer": {"step": 3}, "config": {"run": {"seed": 42}}, "epoch": 9}, file)
    model, leaves = values(hf_import.convert(*sources, [str(file)], str(tmp_path / "out"), say=said.append))
    assert model.qformer == config_lib.QFormer(width=128, depth=4, heads=2, mlp_width=96, cross_every=2, queries=6,
                                               eps=1e-12)
    fits, table, count = context == 24, mfam.qformer_table(model.qformer), 0
    assert any("cross-attention" in line for line in said) != fits
    if not fits:
        table = table.without(r"groups/blocks/0/cross/(k|v)/kernel|context_norm/.*", "of another width")
    for level in range(3):
        mine = {name.removeprefix("mfam/qformers/"): leaf[level] for name, leaf in leaves.items()
                if name.startswith("mfam/qformers/")}
        back = tables.to_torch(table, mine)
        for name, tensor in state.items():
            if not re.fullmatch(QUERY_BRANCH, name):
                continue
            key = name
            for theirs, huggingface in (
                    ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"), ("Qformer.bert.", "qformer."),
                    (".self.", ".attention."), ("llm_proj", "language_projection")):
                key = key.replace(theirs, huggingface)
            if not fits and re.search(r"crossattention\.attention\.(key|value)\.weight|ln_vision", key):
                assert key not in back
                continue
            assert back[key].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(bits(back[key]), bits(tensor.numpy()), name)
            count += 1
    assert count == 3 * len(back)


def test_a_lavis_geometry_is_the_preset():
    with torch.device("meta"):
        public, once = lavis(1408, 768, 12, 3072, 2, 32, 4096), lavis(depth=3, every=3)
    public, once = (mfam.qformer_of({name: tensor.shape for name, tensor in state.items()})
                    for state in (public, once))
    assert public == config_lib.model("7b").qformer and once.cross_every == 3


@pytest.mark.parametrize(("change", "reason"), [
    (lambda s: s.pop("query_tokens"), "it holds no query_tokens"),
    (lambda s: s.update(query_tokens=torch.zeros(6, 128)), r"query_tokens is \(6, 128\), not \(1, queries, width\)"),
    (lambda s: s.update(lavis(width=96)), "its width 96 is no multiple of 64"),
    (lambda s: s.update(lavis(depth=6, every=3)), r"cross-attention stands in the blocks \[0, 2, 3\] of 6"),
    (lambda s: s.update(lavis(depth=5, every=5)), r"cross-attention stands in the blocks \[0, 2\] of 5"),
    (lambda s: [s.pop(name) for name in list(s) if "crossattention" in name], r"stands in the blocks \[\] of 4"),
    (lambda s: [s.pop(name) for name in list(s) if ".layer.1." in name], "of its 4 blocks 1 are not there"),
    (lambda s: [s.pop(name) for name in list(s) if "layer" in name], "it holds no blocks encoder.layer.N"),
    (lambda s: [s.pop(name) for name in list(s) if "intermediate_query" in name], "no intermediate_query.dense"),
])
def test_a_file_whose_tensors_do_not_tell_the_geometry_is_one_sentence(tmp_path, change, reason):
    sources, state, file = parts(tmp_path), lavis(), tmp_path / "some.pth"
    change(state)
    torch.save({"model": state}, file)
    with pytest.raises(ConfigError, match=f"some.pth: there is no config.json .*{reason}") as caught:
        hf_import.convert(*sources, [str(file)], str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_tensor_that_does_not_fit_a_derived_geometry_is_named(tmp_path):
    sources, state, file = parts(tmp_path), lavis(), tmp_path / "some.pth"
    state["Qformer.bert.encoder.layer.3.output_query.dense.weight"] = torch.zeros(128, 95)
    torch.save({"model": state}, file)
    with pytest.raises(ConfigError, match=r"wrong shape: Qformer.*layer.3.output_query.dense.weight is "
                       r"\(128, 95\), the model needs \(128, 96\)"):
        hf_import.convert(*sources, [str(file)], str(tmp_path / "out"))


def test_sources_are_recorded_with_the_licence_that_each_states(tmp_path):
    sources = parts(tmp_path)
    (tmp_path / "vit" / "README.md").write_text("---\ntags:\n- vision\nlicense: mit\n---\n# CLIP\n")
    (tmp_path / "llm" / "README.md").write_text("# Only words\nlicense: none\n")
    folders = [with_queries(tmp_path / name) for name in config_lib.LEVELS]
    (tmp_path / "low" / "README.md").write_text("---\nlicense: [mit, bsd-3-clause]\n---\n")
    (tmp_path / "middle" / "README.md").write_text("---\nlicense: {\n---\n")
    saved = locate.find(hf_import.convert(*sources, folders, str(tmp_path / "out")))
    assert saved.meta["sources"] == {
        "vit": {"name": sources[0], "licence": "mit"},
        "llm": {"name": sources[1], "licence": ""},
        "qformer": [{"name": folders[0], "licence": "mit, bsd-3-clause"}, {"name": folders[1], "licence": ""},
                    {"name": folders[2], "licence": ""}]}
    assert "README.md" in torch_files.HUB_FILES
    assert torch_files.licence(tmp_path / "vit" / "model.safetensors") == "mit"


def test_training_reads_it_with_the_rest_at_random(tmp_path, monkeypatch):
    small = dataclasses.replace(config_lib.model("7b"), qformer=dataclasses.replace(
        miniature.MODEL.qformer, queries=32))
    monkeypatch.setattr(config_lib, "model", lambda _: small)
    saved = locate.find(hf_import.convert(*parts(tmp_path), [], str(tmp_path / "out")))
    config = config_lib.from_config_dict(saved.meta["config"])
    config = dataclasses.replace(config, init=str(saved.path), tokenizer=str(saved.path / "tokenizer.model"))
    shapes = Geometry.of(config.model)
    layout = sharding.parameters(shapes.shapes, sharding.make_mesh(config_lib.Mesh()))
    kept = {name: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=layout[name])
            for name, leaf in shapes.shapes.items()}
    loaded = restore.load(saved, shapes, config, kept)
    assert set(loaded) == set(shapes.shapes)
    head = torch_files.tensors(tmp_path / "llm")["lm_head.weight"].read()
    np.testing.assert_array_equal(np.asarray(loaded["decoder/head/kernel"]), head.T)
    assert float(np.std(loaded["mfam/qformers/queries"])) > 0.01
    other = dataclasses.replace(config, model=dataclasses.replace(
        config.model, encoder=dataclasses.replace(config.model.encoder, heads=4)))
    with pytest.raises(CheckpointError, match=r"another geometry: model.encoder.heads: 2 -> 4"):
        restore.load(saved, shapes, other, kept)
    shallow = dataclasses.replace(config, model=dataclasses.replace(
        config.model, depths=config_lib.Depths(low=0.5)))  # nothing was trained at the depths of the preset yet
    assert set(restore.load(saved, shapes, shallow, kept)) == set(shapes.shapes)


def test_an_interrupted_conversion_is_no_checkpoint_and_is_begun_anew(tmp_path, monkeypatch):
    sources, out = parts(tmp_path), tmp_path / "out"
    count = 0

    def dies(tensor, transform):
        def piece():
            nonlocal count
            count += 1
            if count == 20:
                raise OSError("the disk is gone")
            return transform.to_jax(tensor.read())
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(hf_import, "_reader", dies)
        with pytest.raises(CheckpointError, match="could not be saved"):
            hf_import.convert(*sources, [], str(out))
    assert not out.exists()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        locate.find(tmp_path / "out.partial")
    assert locate.find(hf_import.convert(*sources, [], str(out))).path == out
    with pytest.raises(CheckpointError, match="exists already"):
        hf_import.convert(*sources, [], str(out))


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_a_reader_accepts(tmp_path):
    sources, out = parts(tmp_path), tmp_path / "out"
    # A progress bar that takes its time, so that the blow falls in the middle of writing or of finishing.
    code = ("import sys, time; from calm_jax.convert import hf_import as c; "
            "r = c._reader; c._reader = lambda *a: (lambda: (time.sleep(0.01), r(*a)())[1]); "
            "print('begins', flush=True); c.convert(sys.argv[1], sys.argv[2], [], sys.argv[3])")
    rng, interrupted = np.random.default_rng(0), 0
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code, *sources, str(out)], cwd=ROOT, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL)
        child.stdout.readline()
        time.sleep(rng.uniform(0.1, 2.5))
        child.kill()
        child.wait()
        if out.exists():
            assert locate.find(out).path == out  # it was done: then it is whole
            shutil.rmtree(out)
            continue
        interrupted += 1
        with pytest.raises(CheckpointError):
            locate.find(tmp_path / "out.partial")
    assert interrupted
    assert locate.find(hf_import.convert(*sources, [], str(out))).path == out


def test_a_tied_head_is_its_embedding(tmp_path):
    """One leaf for both; a second copy in the folder must be the same."""
    sources = parts(tmp_path)
    config = llama().config
    config.tie_word_embeddings = True
    shutil.rmtree(sources[1])
    write(transformers.LlamaForCausalLM(config), tmp_path / "llm", "safetensors")
    shutil.copyfile(SHIPPED, tmp_path / "llm" / "tokenizer.model")
    assert "lm_head.weight" not in torch_files.tensors(tmp_path / "llm")
    model, leaves = values(hf_import.convert(*sources, [], str(tmp_path / "out")))
    assert model.decoder.tied and not any(path.startswith("decoder/head") for path in leaves)
    file = tmp_path / "llm" / "model.safetensors"
    state = dict(safetensors_torch.load_file(file))
    table = state["model.embed_tokens.weight"]
    np.testing.assert_array_equal(leaves["decoder/embedding"], table.numpy())
    safetensors_torch.save_file(state | {"lm_head.weight": table.clone()}, file)
    _, again = values(hf_import.convert(*sources, [], str(tmp_path / "again")))
    assert again.keys() == leaves.keys()
    safetensors_torch.save_file(state | {"lm_head.weight": table + 1}, file)
    with pytest.raises(ConfigError, match=r"lm_head.weight is not the same as model.embed_tokens.weight: .*set that to "
                       "false in its config.json"):
        hf_import.convert(*sources, [], str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def change(path, **values_):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values_))


def harm(folder, what):
    """Spoils one thing in a converted part's folder; returns what the sentence must say."""
    vit_file, shard = folder / "vit" / "model.safetensors", next((folder / "llm").glob("model-00001-*.safetensors"))
    if what == "missing shard":
        shard.unlink()
        return rf"lacks 1 of its [0-9]+ shards: {shard.name}; fetch them again"
    if what == "truncated file":
        vit_file.write_bytes(vit_file.read_bytes()[:-100])
        return r"vit/model.safetensors is truncated or no safetensors file"
    if what == "tensor that the index promises":
        index = folder / "llm" / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        table["weight_map"]["model.extra"] = shard.name
        index.write_text(json.dumps(table))
        return "promises model.extra in model-00001"
    if what == "damaged index":
        (folder / "llm" / "model.safetensors.index.json").write_text("{")
        return "model.safetensors.index.json is damaged"
    if what == "no config":
        (folder / "vit" / "config.json").unlink()
        return r"vit/config.json is missing"
    if what == "wrong geometry":
        change(folder / "vit", hidden_size=32)
        return r"(?s)wrong shape: .*class_embedding is \(24,\), the model needs \(32,\)"
    if what == "tensor of the wrong shape":
        state = dict(safetensors_torch.load_file(vit_file))
        name = next(name for name in state if name.endswith("class_embedding"))
        safetensors_torch.save_file(state | {name: torch.zeros(23)}, vit_file)
        return r"wrong shape: .*class_embedding is \(23,\), the model needs \(24,\)"
    if what == "unknown architecture":
        change(folder / "llm", model_type="mamba")
        return "model_type is 'mamba' instead of llama"
    if what == "scaled rotary frequencies":
        change(folder / "llm", rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=None)
        return r"rotary frequencies are scaled \('linear'\)"
    if what == "pickle of something else":
        vit_file.unlink()
        (folder / "vit" / "pytorch_model.bin").write_bytes(pickle.dumps(print))
        return "is a pickle of other things than weights, and is not opened"
    if what == "truncated bin":
        state = safetensors_torch.load_file(vit_file)
        vit_file.unlink()
        torch.save(state, folder / "vit" / "pytorch_model.bin")
        content = (folder / "vit" / "pytorch_model.bin").read_bytes()
        (folder / "vit" / "pytorch_model.bin").write_bytes(content[:-200])
        return r"vit/pytorch_model.bin is truncated or no weight file"
    if what == "tokenizer of another vocabulary":
        change(folder / "llm", vocab_size=2050)
        return r"tokenizer.model has 2048 pieces and the language model beside it 2050"
    if what == "no tokenizer":
        (folder / "llm" / "tokenizer.model").unlink()
        return "cannot read the tokenizer .*llm/tokenizer.model: there is no such file; .*fetch it into that folder"
    vit_file.unlink()
    return "vit holds no weights: none of model.safetensors.index.json"


@pytest.mark.parametrize("what", [
    "missing shard", "truncated file", "tensor that the index promises", "damaged index", "no config",
    "wrong geometry", "tensor of the wrong shape", "unknown architecture", "scaled rotary frequencies",
    "pickle of something else", "truncated bin", "tokenizer of another vocabulary", "no tokenizer", "no weights"])
def test_wrong_input_is_one_clear_sentence_and_leaves_nothing(tmp_path, what):
    torch.manual_seed(0)
    write(vit(), tmp_path / "vit", "safetensors")
    write(llama(), tmp_path / "llm", "safetensors sharded")
    shutil.copyfile(SHIPPED, tmp_path / "llm" / "tokenizer.model")
    sentence = harm(tmp_path, what)
    with pytest.raises(ConfigError, match=sentence):
        hf_import.convert(str(tmp_path / "vit"), str(tmp_path / "llm"), [], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_a_place_that_is_neither_folder_nor_hub_id_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere/at/all does not exist; give a folder"):
        torch_files.locate("nowhere/at/all")


@pytest.mark.parametrize(("found", "reason"), [
    ({"model_type": "clip_vision_model", "hidden_act": "silu"}, "hidden_act is 'silu' instead of quick_gelu or gelu"),
    ({"model_type": "siglip2"}, "model_type is 'siglip2' instead of clip"),
])
def test_encoders_that_calm_does_not_compute_are_refused(found, reason):
    with pytest.raises(ConfigError, match=reason):
        families.read(json_files.Table(found, "config.json"), "encoder")


def test_public_geometries_are_the_presets():
    clip = {"model_type": "clip", "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14}}
    vicuna = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
              "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
              "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None, "vocab_size": 32000}
    preset = config_lib.model("7b")
    blip = {"model_type": "blip-2", "qformer_config": {}, "num_query_tokens": 32}
    clip, vicuna, blip = (json_files.Table(found, "config.json") for found in (clip, vicuna, blip))
    assert families.read(clip, "encoder") == preset.encoder
    assert families.read(vicuna, "language model") == preset.decoder
    assert mfam.qformer(blip) == preset.qformer


@pytest.mark.slow
def test_the_benchmark_makes_folders_that_convert(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # an MFAM of 280 million random numbers is written
    model = config_lib.Model(
        encoder=config_lib.encoder("clip", image_size=28, patch=7, width=24, depth=2, heads=2, mlp_width=40),
        decoder=config_lib.decoder("llama", vocab=2060, width=32, depth=2, heads=4, kv_heads=2, mlp_width=48,
                                   positions=512))
    result = bench_conversion.measure(model, tmp_path / "scratch")
    held = sum(2 * np.prod(leaf.shape) for path, leaf in Geometry.of(model).shapes.items() if "mfam" not in path)
    assert 0 <= result["convert"]["bytes"] - held < 20_000 < result["export"]["bytes"] - held  # the MFAM besides
    for way in ("convert", "export"):
        assert result[way]["ratio"] > 0 and result[way]["peak_anonymous_bytes"] > 1 << 20
        assert f"\n  {way}  " in bench_conversion.show(result)
    assert not (tmp_path / "scratch").exists()
