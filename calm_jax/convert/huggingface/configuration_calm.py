"""Geometry of a CALM model: encoder, three Q-Formers, language model, and what the export knows of its training."""

from transformers import PretrainedConfig


class CalmConfig(PretrainedConfig):
    """Args:
        vit: family ("clip", "dinov2" or "siglip": whose names the tensors have), image_size, native_size (of the images
            whose position embeddings are stored; 0 = image_size), patch, width, depth, heads, mlp_width, eps,
            activation ("quick_gelu", "gelu", "gelu_tanh" or "swiglu"), stem ("patch", or "conv" of a CLIP), stem_bias,
            cls (whether a class token comes first), registers (tokens behind it without a position), pre_norm (a
            LayerNorm before the first block), layer_scale (learned vectors that multiply the branches of a block) and
            antialias (of position embeddings where the grid shrinks).
        taps: part -> number of encoder blocks run before it reads (low, middle, high, thematic).
        qformer: width, depth, heads, mlp_width, cross_every, queries and eps of each of the three.
        thematic: pool, the side of the square of patches averaged into a thematic token, and norm, whether there is a
            LayerNorm before the fully connected layer.
        llama: vocab, width, depth, heads, kv_heads, mlp_width, eps, rope_theta, positions, head_dim (channels of a
            head; 0 = width / heads), qkv_bias, qk_norm, and of the rotary scaling "llama3" rope_factor (1 = none),
            rope_low_factor, rope_high_factor and rope_original.
        score_head: width, hidden channels of the regression head; 0 is none.
        lora: rank, alpha, and targets (names of the linear layers that carry a low-rank update); rank 0 is none.
        taught: what its last training taught it: process, tasks, and skills (score, levels, head, comment, suggest,
            attributes, personalise, ask); None where that is not known.
        tie_word_embeddings: whether the language model's head is its embedding.
    """

    model_type = "calm"

    def __init__(self, vit=None, taps=None, qformer=None, thematic=None, llama=None, lora=None, score_head=None,
                 taught=None, **kwargs):
        self.vit, self.taps, self.qformer, self.llama = vit or {}, taps or {}, qformer or {}, llama or {}
        self.thematic = thematic or {"pool": 1, "norm": False}
        self.lora = lora or {"rank": 0, "alpha": 1.0, "targets": []}
        self.score_head = score_head or {"width": 0}
        self.taught = taught
        # Names that transformers' generation and caches ask for.
        self.vocab_size = self.llama.get("vocab", 0)
        self.hidden_size = self.llama.get("width", 0)
        self.num_hidden_layers = self.llama.get("depth", 0)
        self.num_attention_heads = self.llama.get("heads", 0)
        self.num_key_value_heads = self.llama.get("kv_heads", 0)
        self.max_position_embeddings = self.llama.get("positions", 0)
        self.head_dim = self.llama.get("head_dim") or self.hidden_size // max(self.num_attention_heads, 1)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
