"""tools.export_to_hf and tools.check_parity: what transformers, today's and 4.46, makes of an export, and what a killed
or wrong one leaves."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings

import miniature
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from PIL import Image
from test_conversion import bits, parts, with_queries

from calm_jax import config as config_lib
from calm_jax.checkpoints import array_io, locate, on_disk, restore
from calm_jax.checkpoints.store import Checkpoints
from calm_jax.convert import hf_export, hf_import, parity, tables, torch_files, whole
from calm_jax.convert.sources import gguf_tokenizer
from calm_jax.data import scale
from calm_jax.data.samples import Answer, Sample, Turn
from calm_jax.data.tasks import instructions
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.models import parameters
from calm_jax.text import chat as chat_lib
from calm_jax.text.prompts import Layout, encode
from calm_jax.text.tokenizers import SHIPPED
from calm_jax.text.tokenizers.hugging_face import HuggingFaceTokenizer

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
ROOT = pathlib.Path(__file__).resolve().parents[2]
OLD = ROOT / ".venv-transformers-4.46" / "bin" / "python"
PYTHONS = {"today's": sys.executable, "4.46": str(OLD)}
WRITERS = ["today's", pytest.param("4.46", marks=pytest.mark.slow)]


def client(python, command, folder):
    """tests/hf_client.py under an interpreter; its answer."""
    if not pathlib.Path(python).is_file():
        pytest.skip(f"{python} is missing: make test-env builds it")
    scratch = pathlib.Path(folder).parent / f"modules-{pathlib.Path(python).parts[-3]}"
    done = subprocess.run([python, str(ROOT / "tests" / "hf_client.py"), command, str(folder)], text=True,
                          capture_output=True, env={**os.environ, "HF_MODULES_CACHE": str(scratch)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=WRITERS)
def exported(request, tmp_path_factory):
    """Sources as either version writes them, the checkpoint made of them, and its export with all parts."""
    folder = tmp_path_factory.mktemp("exported")
    assert client(PYTHONS[request.param], "write", folder)["transformers"].startswith(
        "4.46.3" if request.param == "4.46" else transformers.__version__)
    shutil.copyfile(SHIPPED, folder / "llm" / "tokenizer.model")
    state = safetensors.numpy.load_file(folder / "qformer" / "model.safetensors")
    state["query_tokens"] = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
    safetensors.numpy.save_file(state, folder / "qformer" / "model.safetensors", {"format": "pt"})
    hf_import.convert(str(folder / "vit"), str(folder / "llm"), [str(folder / "qformer")], str(folder / "calm"))
    hf_export.export(str(folder / "calm"), str(folder / "hf"), parts=True)
    return folder


@pytest.mark.parametrize("reader", PYTHONS)
def test_torch_computes_the_same_whichever_version_wrote_and_reads(exported, tmp_path, reader):
    if not pathlib.Path(PYTHONS[reader]).is_file():
        pytest.skip(f"{PYTHONS[reader]} is missing: make test-env builds it")
    files = parity.made(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(files[0]).save(tmp_path / "turned.jpg", exif=turned)
    Image.open(files[1]).convert("L").resize((31, 7)).save(tmp_path / "grey.png")
    result = parity.check(str(exported / "calm"), str(exported / "hf"), python=PYTHONS[reader],
                                images=(*files, str(tmp_path / "turned.jpg"), str(tmp_path / "grey.png")))
    print(parity.show(result))
    assert result.holds() and not result.differs
    assert result.logits < 2e-5 and result.scores < 1e-4 and result.kl < 1e-5
    assert result.answers == result.agree == result.searched == 7 and len(result.stages) == 5 + 3 + 1 + 3 + 2
    assert result.report["transformers"].startswith("4.46.3" if reader == "4.46" else transformers.__version__)


@pytest.mark.parametrize("reader", PYTHONS)
def test_an_export_and_its_parts_are_used_as_transformers_models_are(exported, reader):
    read = client(PYTHONS[reader], "read", exported / "hf")
    tokens = read["parts"].pop("tokens")
    assert tokens == [1, *restore.chat(locate.find(exported / "calm")).tokenizer.encode("It has noise: 10.0")]
    assert len(read["parts"]) == 5 and not any(read["parts"].values())  # nothing missing, nothing unexpected
    found = read["whole"]
    assert len(set(found["scores"])) == 5 and all(1 <= score <= 10 for score in found["scores"])
    np.testing.assert_allclose(found["alone"], found["scores"], atol=1e-5)
    np.testing.assert_allclose(found["saved"], found["scores"], atol=1e-5)  # the same weights at other addresses
    np.testing.assert_allclose(found["bfloat16"], found["scores"], atol=0.1)
    np.testing.assert_allclose(found["spread"][0][0], found["scores"][0], atol=1e-5)
    assert len(found["comments"]) == 5 and all(found["comments"]) and found["asked"][0]
    said = found["said"]
    assert said["greedy"] == said["uncached"] and len(said["several"]) == 2 and said["beams"][0]
    steps = found["lengths"]  # of what is computed, beside that of the prompt: after it one token at a time
    assert steps["greedy"][0] == 0 and len(set(steps["greedy"][1:])) == 1 and steps["greedy"][1] < 0, steps
    assert steps["uncached"] == list(range(len(steps["uncached"]))), steps
    assert said["sampled"] != said["greedy"] and found["gradient"]
    assert found["conversation"][0].endswith("USER: What? ASSISTANT: A thing. USER: Why? ASSISTANT:")
    for error, words in zip(found["refused"], (
            "/nowhere.jpg does not exist", "has 1 <image> and there are 0 pictures",
            "there are 3 texts and pictures for 2", "contains 'USER:', a marker", "is no picture; give uint8",
            "the roles are user and assistant"), strict=True):
        assert words in error


# ---- every family of encoders, every option of the language model, every chat template ---------------------------


LORA = config_lib.Lora(rank=2, alpha=3.0, targets=r"decoder/blocks/(q|down)|mfam/qformers/groups/blocks/0/cross/v|"
                                                  r"mfam/thematic/project|encoder/blocks/up")


def byte_level(folder, split, special, named=None):
    """A tokenizer.json as published models have it, by the split of texts that GGUF files name."""
    parts = gguf_tokenizer.SPLITS[split]
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    made = tokenizers.Tokenizer.from_str(json.dumps({
        **content, "pre_tokenizer": parts["pre_tokenizer"], "normalizer": parts.get("normalizer"),
        "decoder": gguf_tokenizer.BYTES}))
    made.train_from_iterator(
        [*parity.QUESTIONS, *scale.DECIMALS, *scale.LEVELS, instructions.SCORE[0], "system user assistant"] * 3,
        tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False,
                                       initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return str(folder / "tokenizer.json"), -(-made.get_vocab_size() // 64) * 64


def vision(family, **options):
    return config_lib.encoder(family, **{"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2,
                                         "mlp_width": 64, **options})


def language(vocab=2048, **options):
    return dataclasses.replace(miniature.MODEL.decoder, vocab=vocab, kv_heads=1, **options)


def combinations(place):
    """name -> a checkpoint of random parameters, none of which is zero or one."""
    smollm, smollm_size = byte_level(place / "smollm", "smollm", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    qwen, qwen_size = byte_level(place / "qwen", "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                 {"bos_token": None, "eos_token": "<|im_end|>"})
    llama, llama_size = byte_level(place / "llama", "llama-bpe", [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    cases = {
        "dinov2-smollm2": dict(
            tokenizer=smollm, template="chatml_bare", encoder=vision("dinov2", native_size=56), lora=LORA,
            decoder=language(smollm_size, tied=True), thematic=config_lib.Thematic(pool=2, norm=True)),
        "siglip-qwen2": dict(
            tokenizer=qwen, template="qwen", encoder=vision("siglip", native_size=24, eps=1e-3),
            decoder=language(qwen_size, qkv_bias=True, rope_theta=1e6)),
        "clip-qwen3": dict(  # and TinyLlama's template, in SentencePiece
            template="zephyr", encoder=vision("clip", native_size=40, activation="gelu", mean=(0.3, 0.4, 0.5)),
            decoder=language(tied=True, qk_norm=True, head_dim=24)),
        "dinov2-llama3": dict(
            tokenizer=llama, template="llama3", score_head=config_lib.ScoreHead(8),
            encoder=vision("dinov2", native_size=56, activation="swiglu", registers=3),
            decoder=language(llama_size, rope_factor=8.0, rope_original=64))}
    return {name: miniature.saved(place / name, parts=config_lib.PARTS, drawn=True, **case)
            for name, case in cases.items()}


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    """name -> (checkpoint, its export)."""
    place = tmp_path_factory.mktemp("combined")
    return {name: (source, str(hf_export.export(source, str(place / "hf" / name), parts=True)))
            for name, source in combinations(place).items()}


@pytest.fixture
def one_batch(monkeypatch):
    """Of the conversations of `parity` the batch of four alone, whose rows show none, one and three pictures: half as
    many programs are compiled."""
    cases = parity._cases
    monkeypatch.setattr(parity, "_cases", lambda model, files: cases(model, files)[-1:])


@pytest.mark.slow
@pytest.mark.usefixtures("one_batch")
@pytest.mark.parametrize("reader", WRITERS)
def test_torch_computes_every_family_and_option_alike(combined, reader):
    """One process of torch for all."""
    if not pathlib.Path(PYTHONS[reader]).is_file():
        pytest.skip(f"{PYTHONS[reader]} is missing: make test-env builds it")
    results = parity.check_all([*combined.values()], python=PYTHONS[reader], new_tokens=12)
    for name, result in zip(combined, results, strict=True):
        print(name, parity.show(result), sep="\n")
        assert result.holds() and not result.differs, name
        assert result.logits < 5e-5 and result.scores < 1e-4, name
        assert result.answers == result.agree == result.searched == 4, name


@pytest.mark.slow
@pytest.mark.parametrize("reader", WRITERS)
def test_exports_of_every_family_are_used_as_transformers_models_are(combined, reader):
    """Whole and, where a version has their classes, in parts; of one tensor where the head is the embedding."""
    folder = pathlib.Path(next(iter(combined.values()))[1]).parent
    found = client(PYTHONS[reader], "families", folder)
    assert found.keys() == combined.keys()
    for name, (source, _) in combined.items():
        model, chat, used = locate.find(source).config.model, restore.chat(locate.find(source)), found[name]
        assert used["loading"] == {}, name  # nothing missing, nothing unexpected
        assert used["uncached"] == used["greedy"] and used["lengths"][0] > 1 and set(used["lengths"][1:]) == {1}, name
        assert used["tied"] == [model.decoder.tied] * 2 and used["saved"] == used["greedy"], name
        assert ("language_model.lm_head.weight" in used["written"]) == (not model.decoder.tied), name
        sample = Sample((), (Turn(("What is it?",), Answer("A thing.")), Turn(("Why <b>?",), Answer(""))))
        layout = Layout.of(model, config_lib.PARTS)
        assert used["conversation"] == encode(sample, chat, layout, ask=1).tokens.tolist(), name
        assert used["said"] == chat.tokenizer.decode(token for token in used["greedy"] if token != chat.stop), name
        absent = [reader == "4.46" and name in new for new in (("clip-qwen3",), ("dinov2-llama3",))]
        for part, gone, expected in zip(("language_model", "vision_tower"), absent, (
                {"loading": {}, "words": [*chat.tokenizer.encode("It has noise: 10.0")]},
                {"loading": {}, "mean": [*model.encoder.mean], "std": [*model.encoder.std],
                 "shape": [1, 3, model.encoder.image_size, model.encoder.image_size]}), strict=True):
            assert used.get(part) == (None if gone else expected), (name, part)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2-smollm2", "siglip-qwen2", "clip-qwen3", "dinov2-llama3"])
def test_every_family_comes_back_bit_for_bit(combined, name, tmp_path):
    """The whole by its table, and its parts as sources of a conversion."""
    source, hf = combined[name]
    saved, found = locate.find(source), torch_files.tensors(pathlib.Path(hf))
    model = saved.config.model
    leaves = {path: array.read().result() for path, array in array_io.stored(saved).items()}
    table = whole.table(model)
    table = dataclasses.replace(table, rows=table.rows + tables.lora(table, leaves))
    back = tables.to_jax(table, {key: tensor.read() for key, tensor in found.items()},
                         {path: leaf.shape for path, leaf in leaves.items()})
    assert back.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(bits(back[path]), bits(leaf), path)
    again = hf_import.convert(f"{hf}/parts/vision_tower", f"{hf}/parts/language_model", [], str(tmp_path / "back"),
                              template=saved.config.chat, image_size=model.encoder.image_size)
    read = locate.find(again)
    assert (read.config.model.encoder, read.config.model.decoder) == (model.encoder, model.decoder)
    assert restore.chat(read).tokenizer.fingerprint == restore.chat(saved).tokenizer.fingerprint
    for path, array in array_io.stored(read).items():
        if path in leaves and path.startswith(("encoder/", "decoder/")):
            np.testing.assert_array_equal(bits(array.read().result()), bits(leaves[path]), path)


@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "float16"), ("safetensors sharded", "bfloat16"),
                                             ("bin", "bfloat16"), ("bin sharded", "float32")])
def test_torch_to_orbax_to_torch_is_bit_exact(tmp_path, monkeypatch, form, dtype):
    """Every tensor of every part, in its stored dtype, whole and alone, in one file and in shards."""
    sources = parts(tmp_path, form, dtype)
    levels = []
    for number, level in enumerate(config_lib.LEVELS):
        torch.manual_seed(number)
        levels.append(with_queries(tmp_path / level))
    calm = hf_import.convert(*sources, levels, str(tmp_path / "calm"))
    if "sharded" in form:
        monkeypatch.setattr(torch_files.save, "__kwdefaults__", {**torch_files.save.__kwdefaults__, "shard": 20_000})
    out = hf_export.export(str(calm), str(tmp_path / "hf"), parts=True)
    assert (out / "model.safetensors.index.json").is_file() == ("sharded" in form)
    whole, seen = torch_files.tensors(out), set()
    cases = [("vit", "parts/vision_tower", "vision_tower."), ("llm", "parts/language_model", "language_model.")]
    for place, alone, prefix in cases:
        back = torch_files.tensors(out / alone)
        for name, tensor in torch_files.tensors(tmp_path / place).items():
            bare = name.removeprefix("vision_model.")
            if "post_layernorm" in name or "position_ids" in name:  # named as ignored: nothing in CALM reads them
                continue
            seen.add(prefix + bare)
            for other in (whole[prefix + bare], back[("vision_model." if place == "vit" else "") + bare]):
                assert other.dtype == tensor.dtype == hf_export.DTYPES[dtype]
                np.testing.assert_array_equal(bits(other.read()), bits(tensor.read()), name)
    for number, level in enumerate(config_lib.LEVELS):
        alone = torch_files.tensors(out / f"parts/qformer_{level}")
        beside = torch_files.tensors(out / f"parts/qformer_{level}" / "queries_and_projection.safetensors")
        for name, tensor in torch_files.tensors(tmp_path / level).items():
            key = name if name == "query_tokens" else f"qformer.{name}"
            seen.add(f"mfam.qformers.{number}.{key}")
            for other in (whole[f"mfam.qformers.{number}.{key}"], beside[name] if name in beside else alone[name]):
                np.testing.assert_array_equal(bits(other.read()), bits(tensor.read()), name)
    rest = {name for name in whole if name not in seen}  # what no source had: the projections and the first norm
    assert {name.split(".")[-2] for name in rest} == {"ln_vision", "language_projection", "project"}


# ---- trained checkpoints: our own stem, low-rank updates ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_batch")
def test_updates_and_our_own_stem_compute_the_same(tmp_path):
    """Apart and merged; one process of torch for both."""
    source = miniature.saved(tmp_path / "run", drawn=True, lora=LORA, thematic=config_lib.Thematic(pool=2))
    exports = [hf_export.export(source, str(tmp_path / name), merge_lora=name == "merged")
               for name in ("apart", "merged")]
    results = parity.check_all([(source, str(out)) for out in exports], new_tokens=16)
    for merged, (out, result) in enumerate(zip(exports, results, strict=True)):
        print(parity.show(result))
        assert result.holds() and not result.differs
        names = set(torch_files.tensors(out))
        assert any("lora_A" in name for name in names) != merged
        assert "vision_tower.embeddings.stem.0.weight" in names


@pytest.mark.slow
@pytest.mark.usefixtures("one_batch")
def test_what_a_vocabulary_is_padded_with_is_never_said_by_torch_either(tmp_path, monkeypatch):
    """Its logits are the highest by far: greedy, by beam search and in what scores are read from."""
    def loud(model, key):
        found = initial(model, key)
        return found | {"decoder/head/kernel": found["decoder/head/kernel"].at[:, 2048:].multiply(20)}

    initial = parameters.initial
    monkeypatch.setattr(parameters, "initial", loud)
    source = miniature.saved(tmp_path / "run", decoder=dataclasses.replace(miniature.MODEL.decoder, vocab=2112))
    out = hf_export.export(source, str(tmp_path / "hf"))
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [*range(2048, 2112)]
    result = parity.check(source, str(out), new_tokens=16)
    assert result.holds() and result.scores < 1e-4, parity.show(result)
    (out / "generation_config.json").unlink()  # else torch says them, and the tokenizer does not know them
    with pytest.raises(ConfigError, match="piece id is out of range"):
        parity.check(source, str(out), new_tokens=4)


def test_adapters_are_pefts(tmp_path):
    """The language model alone with its adapter, by PEFT, is the merged language model."""
    import peft
    model = dataclasses.replace(miniature.MODEL, encoder=dataclasses.replace(miniature.MODEL.encoder, stem="patch"))
    source = miniature.saved(tmp_path / "run", drawn=True, encoder=model.encoder, lora=LORA)
    apart = hf_export.export(source, str(tmp_path / "apart"), parts=True) / "parts"
    merged = hf_export.export(source, str(tmp_path / "merged"), parts=True, merge_lora=True) / "parts"
    assert not list(merged.glob("*_lora"))
    assert {path.name for path in apart.glob("*_lora")} == {
        "vision_tower_lora", "language_model_lora", *(f"qformer_{level}_lora" for level in config_lib.LEVELS)}
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32)
    queries, features = torch.randn(1, 2, 32), torch.randn(1, 17, 32)
    runs = {"language_model": (transformers.LlamaForCausalLM, {"input_ids": torch.arange(3, 40)[None]}, "logits"),
            "vision_tower": (transformers.CLIPVisionModel, {"pixel_values": pixels}, "last_hidden_state"),
            "qformer_low": (transformers.Blip2QFormerModel, {
                "query_embeds": queries, "encoder_hidden_states": features}, "last_hidden_state")}
    for name, (cls, inputs, output) in runs.items():
        base = cls.from_pretrained(apart / name)
        expected = getattr(cls.from_pretrained(merged / name)(**inputs), output)
        plain = getattr(base(**inputs), output)
        adapted = peft.PeftModel.from_pretrained(base, apart / f"{name}_lora")
        torch.testing.assert_close(getattr(adapted(**inputs), output), expected, atol=1e-5, rtol=1e-4)
        assert (plain - expected).abs().max() > 1e-3


def test_another_dtype_is_rounded_once(tmp_path):
    source = miniature.saved(tmp_path / "run")
    exact = torch_files.tensors(hf_export.export(source, str(tmp_path / "stored")))
    narrow = torch_files.tensors(hf_export.export(source, str(tmp_path / "narrow"), dtype="bfloat16"))
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in exact.items():
        np.testing.assert_array_equal(bits(narrow[name].read()), bits(tensor.read().astype(narrow[name].dtype)))
        assert tensor.dtype == np.float32


def test_what_was_never_trained_comes_from_its_base_and_its_seed(tmp_path):
    """A checkpoint of some leaves, on one of others, on random numbers: the export holds what training would load."""
    first = miniature.saved(tmp_path / "first", tasks=("caption",))
    config = miniature.config(init=first)
    changed = {"decoder/norm/scale": np.full(32, 3.0, np.float32)}
    checkpoints = Checkpoints(tmp_path / "second", config_lib.Checkpoint())
    checkpoints.save(2, {"parameters": changed, "optimizer": ()}, {
        "process": "only", "rows": 0, "best": None, "trained": sorted(changed), "base": first, "seed": 0,
        "config": dataclasses.asdict(config), "tokenizer": chat_lib.load().tokenizer.fingerprint})
    checkpoints.close()
    out = torch_files.tensors(hf_export.export(str(tmp_path / "second"), str(tmp_path / "hf")))
    assert (out["language_model.model.norm.weight"].read() == 3).all()
    loaded = restore.model(tmp_path / "second").parameters
    back = tables.to_torch(whole.table(miniature.MODEL), {path: np.asarray(leaf) for path, leaf in loaded.items()})
    assert back.keys() == out.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(out[name].read(), value, name)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.count("| only |") == 2 and "never trained on scores" in card


def test_an_export_says_what_it_was_taught_and_warns_of_the_rest(tmp_path):
    out = hf_export.export(miniature.saved(tmp_path / "run", tasks=("score", "caption")), str(tmp_path / "hf"))
    taught = json.loads((out / "config.json").read_text())["taught"]
    assert taught == {"process": "only", "tasks": ["score", "caption"], "skills": ["score"]}
    assert "score, caption" in (out / "README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    pictures = [np.zeros((32, 32, 3), np.uint8)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this model never learned")
        model.score(pictures)
    for unlearned in (lambda: model.comment(pictures, max_new_tokens=1),
                      lambda: model.score(pictures, reader="levels")):
        with pytest.warns(UserWarning, match="never learned"):
            unlearned()


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def reader_refuses(folder):
    """transformers finds no model in the folder."""
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return True


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_a_reader_accepts(tmp_path):
    source, out = miniature.saved(tmp_path / "run"), tmp_path / "hf"
    code = ("import sys, time; from calm_jax.convert import hf_export as e; t = e._tensor; "
            "slow = lambda read: (lambda: (time.sleep(0.02), read())[1]); "
            "e._tensor = lambda *a: e.dataclasses.replace(t(*a), read=slow(t(*a).read)); "
            "w = e._write; e._write = lambda *a: (w(*a), time.sleep(0.2)); "
            "print('begins', flush=True); e.export(sys.argv[1], sys.argv[2], parts=True, say=lambda _: None)")
    rng, interrupted = np.random.default_rng(1), 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, source, str(out)], cwd=ROOT, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL)
        child.stdout.readline()
        time.sleep(rng.uniform(0.2, 3.0))
        child.kill()
        child.wait()
        if out.exists():
            shutil.rmtree(out)
            continue
        interrupted += 1
        assert reader_refuses(tmp_path / "hf.partial")
    assert interrupted >= 2
    assert hf_export.export(source, str(out)) == out and not (tmp_path / "hf.partial").exists()
    assert transformers.AutoConfig.from_pretrained(out, trust_remote_code=True).model_type == "calm"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    source = miniature.saved(tmp_path / "run")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch_files, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left.*free some space.*same command again"):
            hf_export.export(source, str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists() and reader_refuses(tmp_path / "hf.partial")
    hf_export.export(source, str(tmp_path / "hf"))


def test_wrong_input_is_one_clear_sentence(tmp_path, monkeypatch):
    source, out = miniature.saved(tmp_path / "run"), str(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint in .*nowhere"):
        hf_export.export(str(tmp_path / "nowhere"), out)
    with pytest.raises(ConfigError, match="no low-rank updates to merge; leave --merge-lora out"):
        hf_export.export(source, out, merge_lora=True)
    with pytest.raises(ConfigError, match=r"no folder that calm export wrote"):
        parity.check(source, str(tmp_path))
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already; choose another folder"):
        hf_export.export(source, str(tmp_path / "there"))
    for name, sentence in (("ENCODERS", "the encoder of .* is of the family 'clip', and the torch model of exports "
                            "computes eyes alone; such a model can be used here alone"),
                           ("DECODERS", "the language model of .* is of the family 'llama', and"),
                           ("TOKENIZERS", "the tokenizer of .*tokenizer_small.model, is of a kind of its own, and the "
                            "processor of exports knows tokenizer.json alone")):
        with monkeypatch.context() as patch:  # as if they were those of another package
            patch.setattr(hf_export, name, (HuggingFaceTokenizer,) if name == "TOKENIZERS" else ("eyes",))
            with pytest.raises(ConfigError, match=sentence):
                hf_export.export(source, out)
    conv = miniature.saved(
        tmp_path / "conv", drawn=True, lora=dataclasses.replace(LORA, targets="encoder/stem/embed|decoder/blocks/q"),
        encoder=dataclasses.replace(miniature.MODEL.encoder, stem="patch"))
    with pytest.raises(tables.WeightError, match="encoder/stem/embed/lora/a is of no linear layer in torch; merge it"):
        hf_export.export(conv, out)
    said = []
    hf_export.export(source, out, parts=True, say=said.append)
    assert said == ["not written alone: the encoder, which no published class of the family clip can hold"]
    victim = next((tmp_path / "run" / "00000003" / "arrays").rglob("d/*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        hf_export.export(source, str(tmp_path / "other"))


def test_a_tokenizer_that_changed_is_refused(tmp_path):
    source = miniature.saved(tmp_path / "run")
    meta = tmp_path / "run" / "00000003" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": "0123456789ab"}))
    on_disk.write_marker(meta.parent)
    with pytest.raises(CheckpointError, match="trained with another tokenizer"):
        hf_export.export(source, str(tmp_path / "hf"))


@pytest.mark.usefixtures("one_batch")
def test_parity_names_the_layer_that_was_changed(tmp_path):
    """The check can fail: one weight of one block is changed in the export."""
    source = miniature.saved(tmp_path / "run")
    out = hf_export.export(source, str(tmp_path / "hf"))
    state = safetensors.numpy.load_file(out / "model.safetensors")
    state["language_model.model.layers.1.mlp.up_proj.weight"] *= 1.5
    safetensors.numpy.save_file(state, out / "model.safetensors", {"format": "pt"})
    result = parity.check(source, str(out), new_tokens=8)
    assert result.differs == "LLM 2" and not result.holds() and result.kl > 1e-6
    assert "THE TWO DO NOT AGREE" in parity.show(result) and "first differing layer: LLM 2" in parity.show(
        result)


def test_a_folder_written_by_hand_converts_back(tmp_path):
    """The language model of an export is a source again: what was trained goes on elsewhere and comes back."""
    source = miniature.saved(tmp_path / "run", drawn=True,
                             encoder=dataclasses.replace(miniature.MODEL.encoder, stem="patch"))
    out = hf_export.export(source, str(tmp_path / "hf"), parts=True) / "parts"
    back = hf_import.convert(str(out / "vision_tower"), str(out / "language_model"), [], str(tmp_path / "back"))
    leaves = array_io.stored(locate.find(back))
    for path, array in array_io.stored(locate.find(source)).items():
        if path.startswith(("encoder/", "decoder/")):
            np.testing.assert_array_equal(bits(leaves[path].read().result()), bits(array.read().result()), path)


def test_the_programs_run_as_documented(tmp_path):
    source = miniature.saved(tmp_path / "run")
    run = [sys.executable, "-m"]
    done = subprocess.run([*run, "tools.export_to_hf", "--checkpoint", source, "--out", str(tmp_path / "hf"),
                           "--parts", "--merge-lora"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "no low-rank updates to merge" in done.stderr
    done = subprocess.run([*run, "tools.export_to_hf", "--checkpoint", source, "--out", str(tmp_path / "hf"),
                           "--parts"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "trust_remote_code=True" in done.stdout, done.stderr
    done = subprocess.run([*run, "tools.check_parity", "--checkpoint", source, "--hf", str(tmp_path / "hf"),
                           "--new_tokens", "8"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "first differing layer: none" in done.stdout
    assert "greedy answers token by token the same: 7 of 7" in done.stdout
    done = subprocess.run([*run, "tools.check_parity", "--hf", "x"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "--checkpoint is missing: A workdir" in done.stderr
