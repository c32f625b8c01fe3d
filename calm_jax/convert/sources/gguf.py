"""GGUF files of language models: LLaMA's, Qwen2's and Qwen3's, of every quantisation that the library `gguf` reads.

Quantised tensors become float32 when they are read, one at a time; those of float32, float16 and bfloat16 stay bit for
bit. llama.cpp names tensors in its own way, and in files of the architecture `llama` it has the rows of queries and
keys in another order, by which rotary positions turn neighbouring channels; both are undone here.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import tempfile
from typing import Any

import einops
import ml_dtypes
import numpy as np

from calm_jax import json_files
from calm_jax.convert import hf_config, torch_files
from calm_jax.convert.sources import gguf_header, gguf_tokenizer
from calm_jax.convert.torch_files import FileError, Tensor
from calm_jax.text import tokenizers

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Tensors of a GGUF file <- those of transformers; {n} is a block.
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FREQUENCIES = "rope_freqs.weight"
# Metadata of an architecture that are read here, or that change no number: others may, and are refused.
KNOWN = {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
         "expert_used_count", "attention.head_count", "attention.head_count_kv", "attention.key_length",
         "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal", "attention.sliding_window",
         "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type"}
PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}  # ggml's number of a type
# Of the scaling `llama3` in every published model.
LOW, HIGH = 1.0, 4.0
ORIGINAL = tuple(1 << power for power in range(9, 21))  # positions before the scaling
CLOSE = 1e-4  # relative; frequencies are float32 in some writers and float64 in others
REMEDY = "give the Hugging Face folder of the same model"


class Gguf:
    """See `convert.sources.Source`.

    Raises:
      FileError: the header is damaged, or the architecture is none of ARCHITECTURES.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._header = gguf_header.read(path)
        self._found = self._header.metadata
        self._kind = self._found.text("general.architecture")
        if self._kind not in ARCHITECTURES:
            raise self._refuse(f"its architecture is {self._kind[:80]!r}, and {', '.join(ARCHITECTURES)} are read")
        if self._found.whole("split.count", 1, least=0, most=1 << 16) > 1:
            raise FileError(f"{path} is one of several files of a model; join them with llama.cpp's gguf-split --merge")

    def config(self) -> json_files.Table:
        heads, width, head = self._heads, self._whole("embedding_length", hf_config.CHANNELS), self._head
        kv_heads, turned = self._kv_heads, self._whole("rope.dimension_count", hf_config.CHANNELS, self._head)
        if "token_embd.weight" not in self._header.tensors:
            raise self._refuse("it has no token_embd.weight")
        if self._whole("attention.value_length", hf_config.CHANNELS, head) != head:
            raise self._refuse("its values have another number of channels than its keys")
        if self._key("expert_count") in self._found and self._whole("expert_count", 1 << 16, 0, least=0):
            raise self._refuse("it is a mixture of experts")
        unknown = [name[:80] for name in self._found.values
                   if name.startswith(self._key("")) and name.removeprefix(self._key("")) not in KNOWN]
        if unknown:
            raise self._refuse(f"its metadata have {', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}, "
                               "which may change what it computes and which nothing here knows")
        if not self._found.flag(self._key("attention.causal"), True):
            raise self._refuse("its attention sees what comes after")
        positions = self._whole("context_length", hf_config.TOKENS)
        if self._whole("attention.sliding_window", hf_config.TOKENS, positions, least=0) not in (0, positions):
            raise self._refuse("its attention sees a sliding window alone")
        biased = any(re.fullmatch(r"blk\.\d+\.attn_[qkv]\.bias", name) for name in self._header.tensors)
        values = {
            "model_type": self._kind, "hidden_act": "silu", "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head, "max_position_embeddings": positions,
            "num_hidden_layers": self._whole("block_count", hf_config.BLOCKS),
            "intermediate_size": self._whole("feed_forward_length", hf_config.CHANNELS),
            "vocab_size": self._header.tensors["token_embd.weight"].shape[0],
            "rms_norm_eps": self._found.number(self._key("attention.layer_norm_rms_epsilon")),
            "rope_theta": self._found.number(self._key("rope.freq_base"), 1e4),
            "tie_word_embeddings": "output.weight" not in self._header.tensors,
            **({"attention_bias": biased} if self._kind != "qwen2" else {}),
            **({"partial_rotary_factor": turned / head} if turned != head else {}), **self._scaling()}
        return json_files.Table(values, str(self.path), REMEDY, hf_config.GeometryError)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        held = 0
        for name, place in self._header.tensors.items():
            if name == FREQUENCIES:  # in the config
                continue
            tensor, size = self._tensor(name, place)
            held += size
            if tensor.name in found:
                raise FileError(f"{self.path} is damaged: it holds {tensor.name[:80]} twice; {gguf_header.REMEDY}")
            found[tensor.name] = tensor
        if held > self._header.size:  # one place many times over would make a checkpoint without end of a small file
            raise FileError(f"{self.path} is damaged: its tensors overlap; {gguf_header.REMEDY}")
        return found

    def tokenizer(self) -> tokenizers.Tokenizer:
        folder = pathlib.Path(self._written.name)
        for name, content in zip(("tokenizer.json", "tokenizer_config.json"),
                                 gguf_tokenizer.contents_of(self._header), strict=True):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return tokenizers.load(str(folder / "tokenizer.json"), remedy=REMEDY)

    def licence(self) -> str:
        said = self._found.values.get("general.license")
        return torch_files.licence(self.path) or (said if isinstance(said, str) and said.isprintable()
                                                  and len(said) <= 200 else "")

    @functools.cached_property
    def _written(self) -> tempfile.TemporaryDirectory:
        """The folder of the tokenizer's files; removed with this object."""
        return tempfile.TemporaryDirectory(prefix="calm_jax-tokenizer-")

    def _refuse(self, reason: str) -> FileError:
        return FileError(f"{self.path}: {reason}; {REMEDY}")

    def _key(self, name: str) -> str:
        return f"{self._kind}.{name}"

    def _whole(self, name: str, most: int, default: Any = json_files.NEEDED, *, least: int = 1) -> int:
        return self._found.whole(self._key(name), default, least=least, most=most)

    @property
    def _heads(self) -> int:
        return self._whole("attention.head_count", hf_config.CHANNELS)

    @property
    def _kv_heads(self) -> int:
        return self._whole("attention.head_count_kv", hf_config.CHANNELS, self._heads)

    @property
    def _head(self) -> int:
        """Channels of a head."""
        width = self._whole("embedding_length", hf_config.CHANNELS)
        if self._key("attention.key_length") not in self._found and width % self._heads:
            raise self._refuse(f"{width} channels do not divide among {self._heads} heads")
        return self._whole("attention.key_length", hf_config.CHANNELS, width // self._heads)

    # ---- rotary frequencies ------------------------------------------------------------------------------------------

    def _scaling(self) -> dict[str, Any]:
        """The field `rope_scaling` of a config.json, where frequencies are scaled."""
        kind = self._found.text(self._key("rope.scaling.type"), "none")
        linear = self._found.number(self._key("rope.scale_linear"), 1.0)
        if kind == "none" and linear != 1:
            kind = "linear"
        if kind != "none":
            if FREQUENCIES in self._header.tensors:
                raise self._refuse(f"its rotary frequencies are scaled twice, by {kind[:80]!r} and by {FREQUENCIES}")
            return {"rope_scaling": {"rope_type": kind, "factor": self._found.number(
                self._key("rope.scaling.factor"), linear)}}  # the family says what it does not compute
        if FREQUENCIES not in self._header.tensors:
            return {}
        return self._llama3()

    def _llama3(self) -> dict[str, Any]:
        """The parameters of the scaling `llama3` whose result the file holds: what every frequency is divided by.

        All published models share two of the four, and the third is a power of two; the parameters found here give the
        factors of the file, or the file is refused.
        """
        tensor, _ = self._tensor(FREQUENCIES, self._header.tensors[FREQUENCIES])
        if tensor.unusable:
            raise FileError(tensor.unusable)
        if tensor.shape != (self._head // 2,):
            raise self._refuse(f"{FREQUENCIES} has the shape {tensor.shape} instead of ({self._head // 2},)")
        divisors = tensor.read().astype(np.float64)
        if np.all(divisors == 1):
            return {}
        factor = float(f"{divisors.max():.6g}")
        theta = self._found.number(self._key("rope.freq_base"), 1e4)
        waves = 2 * math.pi * theta ** (2 * np.arange(self._head // 2) / self._head)
        for original in ORIGINAL:
            smooth = np.clip((original / waves - LOW) / (HIGH - LOW), 0, 1)
            if factor > 1 and np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=CLOSE, atol=0):
                return {"rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": LOW,
                                         "high_freq_factor": HIGH, "original_max_position_embeddings": original}}
        raise self._refuse(f"the factors of {FREQUENCIES} are not those of the scaling 'llama3' with the parameters of "
                           "any published model")

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        """transformers' name; one that is not known stays, and no weight table takes it."""
        found = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)", name)
        if found and found[2] in BLOCK:
            return f"model.layers.{found[1]}.{BLOCK[found[2]]}.{found[3]}"
        return WHOLE.get(name, name)

    def _tensor(self, name: str, place: gguf_header.Place) -> tuple[Tensor, int]:
        """A tensor, and the bytes that it takes in the file.

        Raises:
          FileError: it does not lie within the file.
        """
        import gguf
        shape, own = place.shape, self._name(name)
        try:
            kind = gguf.GGMLQuantizationType(place.kind)
        except ValueError:
            return self._unusable(name, own, shape, f"of the type {place.kind}, which `gguf` does not know"), 0
        count, size = gguf.GGML_QUANT_SIZES[kind]
        if place.kind not in PLAIN and not _dequantised(kind):
            return self._unusable(name, own, shape, f"of the type {kind.name}, which `gguf` does not dequantise"), 0
        if not shape or shape[-1] % count:
            return self._unusable(name, own, shape, f"of the shape {shape}, whose rows are no whole blocks of "
                                  f"{kind.name}"), 0
        nbytes = math.prod(shape) // count * size
        if place.start + nbytes > self._header.size:
            raise FileError(f"{self.path} is truncated: {name[:80]} ends behind its end; {gguf_header.REMEDY}")
        turned = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name) if self._kind == "llama" else None
        heads = (self._heads if turned[1] == "q" else self._kv_heads) if turned else 0
        if heads and shape[0] % (2 * heads):
            return self._unusable(name, own, shape, f"of {shape[0]} rows, an odd number for each of {heads} heads"), 0

        def read() -> np.ndarray:
            try:
                stored = np.fromfile(self.path, np.uint8, nbytes, offset=place.start)
            except OSError as error:
                raise FileError(f"{self.path} cannot be read: {error.strerror or error}") from None
            if stored.size != nbytes:
                raise FileError(f"{self.path} is shorter than it was; {gguf_header.REMEDY}")
            if place.kind in PLAIN:
                values = stored.view(PLAIN[place.kind]).reshape(shape)
            else:
                values = gguf.quants.dequantize(stored.reshape(*shape[:-1], -1), kind).reshape(shape)
            # llama.cpp has the two channels that are turned together side by side, transformers half a head apart.
            return einops.rearrange(values, "(h d two) ... -> (h two d) ...", h=heads, two=2) if heads else values

        return Tensor(own, shape, PLAIN.get(place.kind, np.dtype(np.float32)), read), nbytes

    def _unusable(self, name: str, own: str, shape: tuple[int, ...], flaw: str) -> Tensor:
        """A tensor that is named and never read; where a model needs it, `unusable` says why not."""
        sentence = f"{name[:80]} in {self.path} is {flaw}; {REMEDY}, or another quantisation"

        def read() -> np.ndarray:
            raise FileError(sentence)

        return Tensor(own, shape, np.dtype(np.float32), read, sentence)


@functools.cache
def _dequantised(kind: Any) -> bool:
    """Whether `gguf` turns a type of tensor into float32; of some it knows the size alone."""
    import gguf
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
