"""CALM in torch: a visual encoder (CLIP, DINOv2, SigLIP), three Q-Formers and a fully connected layer (MFAM), and a
language model (LLaMA, and what differs from it by options: SmolLM2, Llama 3, Qwen2, Qwen3).

Everything is computed here, and of transformers only its loading, its caches and `generate` are used, so that the
numbers do not depend on its version.
"""

import itertools
import math
import os
import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_calm import CalmConfig
from .pictures import square  # noqa: F401  (older transformers fetch only the files that are named in this one)
from .processing_calm import CalmProcessor

LEVELS = ("low", "middle", "high")
# What can be said of a score, and what it means: every decimal, and the five words of opinion studies.
DECIMALS = [f"{tenth / 10:.1f}" for tenth in range(10, 101)]
SAID = {"expectation": {text: float(text) for text in DECIMALS},
        "levels": {"Bad": 1.0, "Poor": 3.25, "Fair": 5.5, "Good": 7.75, "Excellent": 10.0}}
# The name under which `generate` hands a cache from step to step; transformers 5.24 has another one than 4.46. With the
# wrong one it would compute everything anew at each step, and say nothing.
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the dtype of the activations."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x)


class RMSNorm(nn.Module):
    """In float32 whatever the dtype of the activations."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x)


class Linear(nn.Linear):
    """A linear layer, plus `alpha / rank * x A^T B^T` where the config names it as a target of low-rank updates."""

    def add_lora(self, rank, alpha):
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.lora_scale = alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora_B(self.lora_A(x)) * self.lora_scale if hasattr(self, "lora_A") else y


def heads_first(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, mask=None):
    """[B, N, T, H] queries, [B, K, S, H] keys and values -> [B, T, N * H]; query head n reads key head n // (N / K)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# ---- visual encoder -----------------------------------------------------------------------------------------------

# Where the tensors of an encoder lie: by the names of CLIPVisionModel, which SiglipVisionModel has too, and by those of
# Dinov2Model and Dinov2WithRegistersModel. `blocks` is the list of blocks, in which the names behind it are.
CLIP_NAMES = {
    "patch": "embeddings.patch_embedding", "stem": "embeddings.stem", "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm",  # the misspelling is CLIP's
    "blocks": "encoder.layers", "attention_norm": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.out_proj", "mlp_norm": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
DINOV2_NAMES = {
    "patch": "embeddings.patch_embeddings.projection", "cls": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings", "registers": "embeddings.register_tokens",
    "blocks": "encoder.layer", "attention_norm": "norm1", "q": "attention.attention.query",
    "k": "attention.attention.key", "v": "attention.attention.value", "o": "attention.output.dense",
    "attention_scale": "layer_scale1.lambda1", "mlp_norm": "norm2", "mlp_scale": "layer_scale2.lambda1"}
NAMES = {"clip": CLIP_NAMES, "siglip": CLIP_NAMES, "dinov2": DINOV2_NAMES}
DINOV2_MLPS = {False: {"up": "mlp.fc1", "down": "mlp.fc2"}, True: {"up": "mlp.weights_in", "down": "mlp.weights_out"}}
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu,
               "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def vision_names(vit):
    """What a tensor of the encoder is -> its name in the encoder, or behind that of its block."""
    names = NAMES[vit["family"]]
    return names | DINOV2_MLPS[vit["activation"] == "swiglu"] if names is DINOV2_NAMES else names


class Named(nn.Module):
    """A module whose layers and vectors lie under the names of a published class: `put` gives them their place, `of`
    finds them."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def put(self, what, value):
        """Registers a module or a parameter under its name, within modules that are made for it."""
        *above, last = self.names[what].split(".")
        place = self
        for name in above:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        setattr(place, last, value)

    def of(self, what):
        place = self
        for name in self.names[what].split("."):
            place = getattr(place, name)
        return place


class VisionBlock(Named):
    """Pre-norm block: attention and an MLP, gated or not, each of which may be multiplied by a learned vector."""

    def __init__(self, vit, names):
        super().__init__(names)
        width, hidden = vit["width"], vit["mlp_width"]
        self.heads, self.activation, self.scaled = vit["heads"], vit["activation"], vit["layer_scale"]
        for norm in ("attention_norm", "mlp_norm"):
            self.put(norm, LayerNorm(width, vit["eps"]))
        for layer in "qkvo":
            self.put(layer, Linear(width, width))
        self.put("up", Linear(width, 2 * hidden if self.activation == "swiglu" else hidden))
        self.put("down", Linear(hidden, width))
        if self.scaled:
            for scale in ("attention_scale", "mlp_scale"):
                self.put(scale, nn.Parameter(torch.ones(width)))

    def forward(self, x):
        y = self.of("attention_norm")(x)
        y = self.of("o")(attend(*(heads_first(self.of(layer)(y), self.heads) for layer in "qkv")))
        x = x + (y * self.of("attention_scale").to(y) if self.scaled else y)
        y = self.of("up")(self.of("mlp_norm")(x))
        if self.activation == "swiglu":
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = ACTIVATIONS[self.activation](y)
        y = self.of("down")(y)
        return x + (y * self.of("mlp_scale").to(y) if self.scaled else y)


class VisionTower(Named):
    """A vision transformer up to the deepest block that is read: [B, 3, S, S] normalised pictures -> hidden states
    after some of its blocks, class token and registers first.

    A patch is embedded by one linear map, or by strided 3x3 convolutions down to the patch grid (`stem`). Position
    embeddings are stored for the grid of the training and interpolated where the grid in use is another one.
    """

    def __init__(self, vit):
        super().__init__(vision_names(vit))
        self.vit, patch, width = vit, vit["patch"], vit["width"]
        if vit["stem"] == "patch":
            self.put("patch", nn.Conv2d(3, width, patch, patch, bias=vit["stem_bias"]))
        else:
            count = patch.bit_length() - 1
            widths = [3] + [max(width >> (count - 1 - i), 32) for i in range(count)]
            self.put("stem", nn.ModuleList([nn.Conv2d(d_in, d_out, 3, 2) for d_in, d_out in itertools.pairwise(widths)]
                                           + [Linear(widths[-1], width)]))
        stored = ((vit["native_size"] or vit["image_size"]) // patch) ** 2 + vit["cls"]
        lead = (1,) if vit["family"] == "dinov2" else ()  # its tokens have axes of one entry in front
        if vit["cls"]:
            self.put("cls", nn.Parameter(torch.zeros(*lead, *lead, width)))
        if vit["registers"]:
            self.put("registers", nn.Parameter(torch.zeros(*lead, vit["registers"], width)))
        self.put("positions", nn.Parameter(torch.zeros(*lead, stored, width)))
        if vit["pre_norm"]:
            self.put("pre_norm", LayerNorm(width, vit["eps"]))
        self.put("blocks", nn.ModuleList([VisionBlock(vit, self.names) for _ in range(vit["depth"])]))

    @property
    def blocks(self):
        return self.of("blocks")

    def tokens(self, what):
        """[N, width] of learned tokens, whatever axes of one entry stand in front."""
        return self.of(what).reshape(-1, self.vit["width"])

    def positions(self):
        """[P, width], or [1 + P, width] with a class token, of the grid in use."""
        stored, first = self.tokens("positions"), int(self.vit["cls"])
        side, wanted = math.isqrt(len(stored) - first), self.vit["image_size"] // self.vit["patch"]
        if side == wanted:
            return stored
        grid = stored[first:].float().T.unflatten(1, (side, side))[None]
        grid = F.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False,
                             antialias=self.vit["antialias"])
        return torch.cat([stored[:first], grid[0].flatten(1).T.to(stored.dtype)])

    def embed(self, pixels):
        if self.vit["stem"] == "patch":
            return self.of("patch")(pixels).flatten(2).transpose(1, 2)
        *convolutions, last = self.of("stem")
        for layer in convolutions:
            pixels = F.gelu(layer(F.pad(pixels, (0, 1, 0, 1))), approximate="tanh")
        return last(pixels.flatten(2).transpose(1, 2))

    def forward(self, pixels, depths):
        positions = self.positions()
        first = [self.tokens("cls") + positions[:1]] if self.vit["cls"] else []
        first += [self.tokens("registers")] if self.vit["registers"] else []
        x = self.embed(pixels) + positions[int(self.vit["cls"]):]
        x = torch.cat([*(tokens.expand(len(x), -1, -1) for tokens in first), x], 1)
        if self.vit["pre_norm"]:
            x = self.of("pre_norm")(x)
        taps = {}
        for number, block in enumerate(self.blocks[:max(depths)], 1):
            taps[number] = x = block(x)
        return {depth: taps[depth] for depth in depths}


# ---- MFAM: Q-Formers of BLIP-2's geometry, with its names ---------------------------------------------------------

class QFormerHeads(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = Linear(width, width), Linear(context, width), Linear(context, width)

    def forward(self, x, context):
        return attend(*(heads_first(layer(y), self.heads)
                        for layer, y in ((self.query, x), (self.key, context), (self.value, context))))


class QFormerOutput(nn.Module):
    """Linear layer and post-norm of a residual branch."""

    def __init__(self, d_in, qformer):
        super().__init__()
        self.dense = Linear(d_in, qformer["width"])
        self.LayerNorm = LayerNorm(qformer["width"], qformer["eps"])

    def forward(self, y, x):
        return self.LayerNorm(x + self.dense(y))


class QFormerAttention(nn.Module):
    def __init__(self, qformer, context):
        super().__init__()
        self.attention = QFormerHeads(qformer["width"], qformer["heads"], context)
        self.output = QFormerOutput(qformer["width"], qformer)

    def forward(self, x, context):
        return self.output(self.attention(x, context), x)


class QFormerUp(nn.Module):
    def __init__(self, qformer):
        super().__init__()
        self.dense = Linear(qformer["width"], qformer["mlp_width"])

    def forward(self, x):
        return F.gelu(self.dense(x))


class QFormerBlock(nn.Module):
    def __init__(self, qformer, context):
        super().__init__()
        self.attention = QFormerAttention(qformer, qformer["width"])
        if context:
            self.crossattention = QFormerAttention(qformer, context)
        self.intermediate_query = QFormerUp(qformer)
        self.output_query = QFormerOutput(qformer["mlp_width"], qformer)

    def forward(self, x, context):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, context)
        return self.output_query(self.intermediate_query(x), x)


class QFormerEncoder(nn.Module):
    def __init__(self, qformer, context):
        super().__init__()
        self.layer = nn.ModuleList([QFormerBlock(qformer, 0 if n % qformer["cross_every"] else context)
                                    for n in range(qformer["depth"])])


class QFormerTrunk(nn.Module):
    def __init__(self, qformer, context):
        super().__init__()
        self.layernorm = LayerNorm(qformer["width"], qformer["eps"])
        self.encoder = QFormerEncoder(qformer, context)

    def forward(self, x, context):
        x = self.layernorm(x)
        for block in self.encoder.layer:
            x = block(x, context)
        return x


class QFormer(nn.Module):
    """Learned queries that read one depth of the encoder, and the linear layer to the language model."""

    def __init__(self, qformer, context, out):
        super().__init__()
        self.ln_vision = LayerNorm(context, 1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, qformer["queries"], qformer["width"]))
        self.qformer = QFormerTrunk(qformer, context)
        self.language_projection = Linear(qformer["width"], out)

    def forward(self, features):
        queries = self.query_tokens.to(features).expand(len(features), -1, -1)
        return self.language_projection(self.qformer(queries, self.ln_vision(features)))


class Thematic(nn.Module):
    """Squares of patches averaged, a norm if there is one, and a fully connected layer."""

    def __init__(self, thematic, context, out):
        super().__init__()
        self.pool = thematic["pool"]
        self.norm = LayerNorm(context, 1e-5) if thematic["norm"] else nn.Identity()
        self.project = Linear(context, out)

    def forward(self, patches):
        if self.pool > 1:
            side = int(patches.shape[1] ** 0.5)
            grid = patches.unflatten(1, (side, side)).movedim(-1, 1)
            patches = F.avg_pool2d(grid.float(), self.pool).to(patches).flatten(2).transpose(1, 2)
        return self.project(self.norm(patches))


class Mfam(nn.Module):
    """Tokens in the order low, middle, high, thematic."""

    def __init__(self, config):
        super().__init__()
        context, out = config.vit["width"], config.llama["width"]
        self.prefix = config.vit["cls"] + config.vit["registers"]  # tokens that stand for no place in the picture
        self.qformers = nn.ModuleList([QFormer(config.qformer, context, out) for _ in LEVELS])
        self.thematic = Thematic(config.thematic, context, out)

    def forward(self, features):
        tokens = [qformer(features[level]) for level, qformer in zip(LEVELS, self.qformers, strict=True)]
        return torch.cat([*tokens, self.thematic(features["thematic"][:, self.prefix:])], 1)


# ---- language model, with names as in LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM ----------------------

def frequencies(llama, device):
    """Rotary frequencies [H / 2], radians a position, float32, the fastest first.

    With `rope_factor` above 1 (the scaling `llama3`), those that turn at most `rope_low_factor` times in
    `rope_original` positions are divided by it, those that turn at least `rope_high_factor` times stay, and those
    between are a blend of both.
    """
    half = head_size(llama) // 2
    found = llama["rope_theta"] ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    if llama["rope_factor"] == 1:
        return found
    low, high = llama["rope_low_factor"], llama["rope_high_factor"]
    kept = ((llama["rope_original"] * found / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return found * (kept + (1 - kept) / llama["rope_factor"])


def head_size(llama):
    """Channels of an attention head."""
    return llama["head_dim"] or llama["width"] // llama["heads"]


def rotate(x, positions, frequencies):
    """Rotary embedding of [B, N, T, H], half-split: channel i is paired with channel i + H / 2."""
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x)


class LlamaAttention(nn.Module):
    """Rotary (grouped-query) attention; queries, keys and values may have biases, and queries and keys a norm over the
    channels of each head."""

    def __init__(self, llama, index):
        super().__init__()
        self.llama, self.index = llama, index
        width, bias = llama["width"], llama["qkv_bias"]
        q_width, kv_width = (head_size(llama) * llama[heads] for heads in ("heads", "kv_heads"))
        self.q_proj, self.o_proj = Linear(width, q_width, bias=bias), Linear(q_width, width, bias=False)
        self.k_proj, self.v_proj = Linear(width, kv_width, bias=bias), Linear(width, kv_width, bias=bias)
        if llama["qk_norm"]:
            self.q_norm, self.k_norm = (RMSNorm(head_size(llama), llama["eps"]) for _ in "qk")

    def forward(self, x, positions, mask, cache):
        q = heads_first(self.q_proj(x), self.llama["heads"])
        k, v = (heads_first(layer(x), self.llama["kv_heads"]) for layer in (self.k_proj, self.v_proj))
        if self.llama["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        turns = frequencies(self.llama, x.device)
        q, k = rotate(q, positions, turns), rotate(k, positions, turns)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.o_proj(attend(q, k, v, mask))


class LlamaMlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, hidden, bias=False), Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, llama, index):
        super().__init__()
        self.input_layernorm = RMSNorm(llama["width"], llama["eps"])
        self.self_attn = LlamaAttention(llama, index)
        self.post_attention_layernorm = RMSNorm(llama["width"], llama["eps"])
        self.mlp = LlamaMlp(llama["width"], llama["mlp_width"])

    def forward(self, x, positions, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaTrunk(nn.Module):
    def __init__(self, llama):
        super().__init__()
        self.embed_tokens = nn.Embedding(llama["vocab"], llama["width"])
        self.layers = nn.ModuleList([LlamaBlock(llama, index) for index in range(llama["depth"])])
        self.norm = RMSNorm(llama["width"], llama["eps"])

    def forward(self, x, positions, mask, cache=None):
        states = [x]
        for block in self.layers:
            x = block(x, positions, mask, cache)
            states.append(x)
        return self.norm(x), states


class Llama(nn.Module):
    """With a head of its own, or with one that is the embedding (`_tied_weights_keys` of the whole)."""

    def __init__(self, llama):
        super().__init__()
        self.model = LlamaTrunk(llama)
        self.lm_head = Linear(llama["width"], llama["vocab"], bias=False)


class ScoreHead(nn.Module):
    """A score on 1-10 and its standard deviation from the hidden state where an answer begins, in float32."""

    def __init__(self, d_in, width):
        super().__init__()
        self.hidden, self.out = Linear(d_in, width), Linear(width, 2)

    def forward(self, hidden):
        y = F.gelu(F.linear(hidden.float(), self.hidden.weight.float(), self.hidden.bias.float()))
        y = F.linear(y, self.out.weight.float(), self.out.bias.float())
        return 5.5 + 2.25 * y[..., 0], 2.25 * y[..., 1].exp()


# ---- the whole ----------------------------------------------------------------------------------------------------

class CalmForCausalLM(PreTrainedModel, GenerationMixin):
    """Scores and comments on photographs.

        model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
        model.score(["a.jpg", "b.jpg"])     # [5.93, 7.12] on the scale 1-10
        model.comment(["a.jpg"])            # ["..."]
        model.ask(["a.jpg"], "What would improve it?")

    `AutoProcessor.from_pretrained(DIR, trust_remote_code=True)(images, text)` gives what `forward` and `generate` take.
    """

    config_class = CalmConfig
    main_input_name = "input_ids"
    _no_split_modules = ("VisionBlock", "QFormerBlock", "LlamaBlock")
    _supports_cache_class = True  # asked for by older versions: caches are objects, not tuples
    _supports_sdpa = True
    # What is one tensor if the config has tie_word_embeddings: newer versions read the pair, older ones its first.
    _tied_weights_keys: ClassVar = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = VisionTower(config.vit)
        self.mfam = Mfam(config)
        self.language_model = Llama(config.llama)
        if config.score_head["width"]:
            self.score_head = ScoreHead(config.llama["width"], config.score_head["width"])
        targets = set(config.lora["targets"])
        for name, module in list(self.named_modules()):
            if name in targets:
                module.add_lora(config.lora["rank"], config.lora["alpha"])
        self._processor = None
        self.post_init()

    def _init_weights(self, module):
        """Of models made from a config alone; everything is in the files of an exported one."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.language_model.lm_head

    def set_output_embeddings(self, value):
        self.language_model.lm_head = value

    def encode(self, pixel_values):
        """Visual tokens [B, I * N, D] of normalised pictures [B, I, 3, S, S], one picture after the other."""
        rows, count = pixel_values.shape[:2]
        pixels = pixel_values.flatten(0, 1).to(self.vision_tower.of("positions"))  # their device and dtype
        taps = self.vision_tower(pixels, tuple(self.config.taps.values()))
        tokens = self.mfam({part: taps[depth] for part, depth in self.config.taps.items()})
        return tokens.reshape(rows, count * tokens.shape[1], -1)

    def embed(self, input_ids, visual=None, pixel_values=None):
        """Word embeddings, and at positions with `visual >= 0` that token of the same row's pictures."""
        words = self.language_model.model.embed_tokens(input_ids)
        if pixel_values is None or visual is None:
            return words
        pool = self.encode(pixel_values).to(words)
        index = visual.clamp(min=0)[..., None].expand(-1, -1, pool.shape[-1])
        return torch.where((visual >= 0)[..., None], pool.gather(1, index), words)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, visual=None, pixel_values=None, labels=None, use_cache=None,
                output_hidden_states=False, return_dict=True, logits_to_keep=0, cache=None, **ignored):
        """Args:
            input_ids, visual: [B, T] as the processor gives them.
            attention_mask: [B, S] over the cached and the new positions; or [B, 1, T, S], True where a query may look.
            pixel_values: [B, I, 3, S, S].
            labels: [B, T], -100 where nothing is learned; label t is predicted from the positions before it.
            logits_to_keep: logits of only so many last positions; 0 is all.
        """
        x = self.embed(input_ids, visual, pixel_values) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = x.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.bool, device=x.device)
        if attention_mask.dim() == 2:
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            attention_mask = _causal(attention_mask.bool(), length)[:, None]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device).expand(batch, -1)
        hidden, states = self.language_model.model(x, position_ids, attention_mask, cache)
        logits = self.language_model.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache},
                                     hidden_states=(*states[:-1], hidden) if output_hidden_states else None)
        return out if return_dict or return_dict is None else out.to_tuple()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, visual=None,
                                      pixel_values=None, inputs_embeds=None, use_cache=None, cache=None, **kwargs):
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        inputs = {"attention_mask": attention_mask, CACHE: cache, "use_cache": use_cache,
                  "logits_to_keep": 1}
        if past == 0 and inputs_embeds is not None:
            return {"inputs_embeds": inputs_embeds, **inputs}
        inputs["input_ids"] = input_ids[:, past:].contiguous()
        if past == 0 and pixel_values is not None:
            said = input_ids.shape[1] - visual.shape[1]  # without a cache, all that was said comes again
            inputs |= {"pixel_values": pixel_values, "visual": F.pad(visual, (0, said), value=-1)}
        return inputs

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def processor(self):
        """What makes tensors of pictures and words; from the folder that the model came from."""
        if self._processor is None:
            name = self.config._name_or_path
            revision = None if os.path.isdir(name) else getattr(self.config, "_commit_hash", None)
            self._processor = CalmProcessor.from_pretrained(name, revision=revision)
        return self._processor

    @processor.setter
    def processor(self, value):
        self._processor = value

    @torch.no_grad()
    def score(self, images, batch_size=8, with_spread=False, reader="expectation"):
        """Aesthetic scores on the scale 1-10, read from the model by its own probabilities or by its regression head.

        Args:
            images: a list of pictures: paths, bytes, PIL images or RGB arrays.
            with_spread: (score, standard deviation) for each picture instead.
            reader: `expectation`, the mean of 1.0, 1.1, ..., 10.0 by the probabilities of saying each of them in
                answer to the processor's `score` instruction; `levels`, that of five words from bad to excellent in
                answer to `level`; `head`, the regression head, if the model has one.
        Raises:
            ValueError: there is no such reader, or no head.
        """
        if reader not in (*SAID, "head"):
            raise ValueError(f"there is no reader {reader!r}; there are {', '.join(SAID)} and head")
        if reader == "head" and not self.config.score_head["width"]:
            raise ValueError("this model has no regression head; leave reader='head' out")
        self._learned(reader if reader in ("levels", "head") else "score")
        read = self._head if reader == "head" else self._tree(SAID[reader])
        instruction = self.processor.instructions["level" if reader == "levels" else "score"]
        scores = []
        for chunk in _chunks(images, batch_size):
            inputs = self.processor([[image] for image in chunk], [instruction] * len(chunk)).to(self.device)
            x = self.embed(inputs["input_ids"], inputs["visual"], inputs["pixel_values"])
            mean, spread = read(x, inputs["attention_mask"].bool())
            scores += list(zip(mean.tolist(), spread.tolist(), strict=True)) if with_spread else mean.tolist()
        return scores

    def _head(self, x, real):
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        hidden, _ = self.language_model.model(x, positions, _causal(real, x.shape[1])[:, None])
        score, spread = self.score_head(hidden[:, -1])
        return score.clamp(1, 10), spread

    def _tree(self, said):
        """What reads the mean of some texts' values, all of them as one tree behind the prompt, in a single pass."""
        spelled = [tuple(self.processor.encode_words(text)) for text in said]
        begun = list(dict.fromkeys(ids[:n] for ids in spelled for n in range(1, len(ids)))) or [spelled[0][:1]]
        number = {(): 0, **{ids: n for n, ids in enumerate(begun, 1)}}
        device = self.device
        tokens = torch.tensor([ids[-1] for ids in begun], device=device)
        depths = torch.tensor([len(ids) for ids in begun], device=device)
        sees = torch.tensor([[a[:len(b)] == b for b in begun] for a in begun], device=device)
        values = torch.tensor(list(said.values()), device=device)

        def read(x, real):
            count, length, nodes = len(x), x.shape[1], len(begun)
            x = torch.cat([x, self.get_input_embeddings()(tokens).expand(count, -1, -1)], 1)
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
            positions = torch.cat([positions, positions[:, -1:] + depths], 1)
            mask = torch.zeros(count, 1, length + nodes, length + nodes, dtype=torch.bool, device=device)
            mask[:, 0, :length, :length] = _causal(real, length)
            mask[:, 0, length:, :length] = real[:, None]
            mask[:, 0, length:, length:] = sees
            hidden, _ = self.language_model.model(x, positions, mask)
            logits = self.language_model.lm_head(hidden[:, length - 1:]).float()
            logits[..., self.generation_config.suppress_tokens or []] = -torch.inf  # nobody can say them
            chances = logits.log_softmax(-1)
            chances = torch.stack([sum(chances[:, number[ids[:n]], token] for n, token in enumerate(ids))
                                   for ids in spelled], -1).softmax(-1)
            mean = chances @ values
            return mean, (chances * (values - mean[:, None]).square()).sum(-1).sqrt()

        return read

    def _learned(self, skill):
        """Warns of answers that mean nothing, because the last training did not teach them."""
        taught = self.config.taught
        if taught is not None and skill not in taught["skills"]:
            warnings.warn(f"this model never learned what is asked ({skill}), so that its answers mean nothing; its "
                          f"last training taught it {', '.join(taught['tasks']) or 'nothing'}", stacklevel=3)

    def comment(self, images, max_new_tokens=128, batch_size=8, **generation):
        """What the model says of each picture when asked for a comment; `generation` goes to `generate`."""
        self._learned("comment")
        return self.ask(images, self.processor.instructions["comment"], max_new_tokens, batch_size, **generation)

    @torch.no_grad()
    def ask(self, images, instruction, max_new_tokens=128, batch_size=8, **generation):
        """The answer to one instruction about each picture; greedy unless `generation` says otherwise."""
        answers = []
        for chunk in _chunks(images, batch_size):
            inputs = self.processor([[image] for image in chunk], [instruction] * len(chunk)).to(self.device)
            ids = self.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **generation})
            answers += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:])
        return answers


def _causal(real, length):
    """[B, length, S]: what the last `length` of S positions see: themselves, and the real ones of [B, S] before them.

    Padding sees itself: a softmax over nothing would be no number, and spread from there.
    """
    places = torch.arange(real.shape[1], device=real.device)
    own = places[-length:, None]
    return ((places <= own) & real[:, None]) | (places == own)


def _chunks(images, size):
    if not isinstance(images, (list, tuple)):
        images = [images]
    return [images[start:start + size] for start in range(0, len(images), size)]


# So that `save_pretrained` writes these files beside the weights, with any version.
CalmConfig.register_for_auto_class()
CalmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
