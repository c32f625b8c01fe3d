"""Random weights and inputs in; the same numbers from Hugging Face's torch models and from ours, out.

Nothing is downloaded: every torch model is small and randomly initialised, with its norms, biases and other constant
tensors drawn at random too, so that no tensor can be mistaken for another or left out unnoticed. Float32 throughout.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import nnx

from calm_jax import config as config_lib
from calm_jax.convert import mfam, tables, whole
from calm_jax.convert.families import clip, llama
from calm_jax.errors import ConfigError
from calm_jax.models import lora
from calm_jax.models.calm import Calm
from calm_jax.models.decoders.llama import Llama
from calm_jax.models.encoders import Feature
from calm_jax.models.encoders.clip import MEAN, STD, ConvStem
from calm_jax.models.mfam import Mfam
from calm_jax.models.parameters import Geometry
from calm_jax.models.qformer import QFormer
from calm_jax.models.vit import Vit

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
torch.set_num_threads(1)  # the operations are so small that threads only wait for one another

TOLERANCE = 1e-4  # measured: at most 1e-5

# No two widths are equal, so that a tensor in the wrong place has the wrong shape wherever it can, and the epsilons are
# large enough to be seen in the results.
MODEL = config_lib.Model(
    encoder=config_lib.encoder("clip", image_size=20, patch=5, width=32, depth=5, heads=4, mlp_width=56, eps=0.03),
    depths=config_lib.Depths(low=1 / 5, middle=2 / 5, high=3 / 5, thematic=4 / 5),
    qformer=config_lib.QFormer(width=24, depth=4, heads=3, mlp_width=40, queries=3, eps=0.01),
    decoder=config_lib.decoder("llama", vocab=61, width=48, depth=3, heads=6, kv_heads=6, mlp_width=72, positions=512,
                           eps=0.02),
    remat="none")
GROUPED = dataclasses.replace(MODEL.decoder, kv_heads=2, rope_theta=500.0)


# ---- torch models -----------------------------------------------------------------------------------------------


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with every parameter drawn anew, at a scale where no layer is near the identity or near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.2 if name.endswith("bias") else 1 + noise * 0.2)
    return model.eval()


def torch_vit(cfg: config_lib.Encoder, seed: int = 0) -> torch.nn.Module:
    return randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, image_size=cfg.image_size, patch_size=cfg.patch, layer_norm_eps=cfg.eps,
        hidden_act="quick_gelu", attn_implementation="eager")), seed)


class TorchQFormer(torch.nn.Module):
    """A Blip2QFormerModel with what Blip2ForConditionalGeneration has around it, under the names it has there."""

    def __init__(self, cfg: config_lib.QFormer, context_width: int, out_width: int, seed: int = 0):
        super().__init__()
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, cfg.queries, cfg.width))
        self.ln_vision = torch.nn.LayerNorm(context_width)
        self.qformer = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
            hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads, cross_attention_frequency=cfg.cross_every, layer_norm_eps=cfg.eps,
            encoder_hidden_size=context_width, hidden_act="gelu", attn_implementation="eager"))
        self.language_projection = torch.nn.Linear(cfg.width, out_width)
        randomised(self, seed)

    def hidden(self, context: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(context), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=context).last_hidden_state

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.language_projection(self.hidden(self.ln_vision(features)))


class TorchMfam(torch.nn.Module):
    def __init__(self, cfg: config_lib.Model, seed: int = 0):
        super().__init__()
        self.qformers = torch.nn.ModuleList(
            TorchQFormer(cfg.qformer, cfg.encoder.width, cfg.decoder.width, seed + level) for level in range(3))
        self.thematic = torch.nn.ModuleDict({
            "project": randomised(torch.nn.Linear(cfg.encoder.width, cfg.decoder.width), seed + 3),
            **({"norm": randomised(torch.nn.LayerNorm(cfg.encoder.width, 1e-5), seed + 4)}
               if cfg.thematic.norm else {})})
        self.pool = torch.nn.AvgPool2d(cfg.thematic.pool)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = [self.qformers[level](features[part]) for level, part in enumerate(config_lib.LEVELS)]
        patches = features["thematic"][:, 1:]
        side = int(patches.shape[1] ** 0.5)
        patches = self.pool(patches.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        patches = self.thematic["norm"](patches) if "norm" in self.thematic else patches
        return torch.cat([*tokens, self.thematic["project"](patches)], 1)


def torch_llama(cfg: config_lib.Decoder, seed: int = 0) -> torch.nn.Module:
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.eps,
        max_position_embeddings=cfg.positions, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation="sdpa")), seed)


class TorchCalm(torch.nn.Module):
    """CALM as it would be put together from the three torch models."""

    def __init__(self, cfg: config_lib.Model):
        super().__init__()
        self.depths = {part: cfg.depths.block(part, cfg.encoder.depth) for part in config_lib.PARTS}
        self.vision_tower = torch_vit(cfg.encoder, 1)
        self.vision_tower.post_layernorm = torch.nn.Identity()  # plays no part
        self.mfam = TorchMfam(cfg, 2)
        self.language_model = torch_llama(cfg.decoder, 6)

    def forward(self, images: np.ndarray, tokens: np.ndarray, visual: np.ndarray) -> torch.Tensor:
        """Logits `[T, V]` of one conversation; images `[I, H, W, 3]` uint8, tokens and visual `[T]` as in our rows."""
        pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        states = self.vision_tower(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        pool = self.mfam({part: states[depth] for part, depth in self.depths.items()}).flatten(0, 1)
        x = self.language_model.get_input_embeddings()(torch.from_numpy(tokens)).clone()
        x[torch.from_numpy(visual >= 0)] = pool[visual[visual >= 0]]
        return self.language_model(inputs_embeds=x[None]).logits[0]


# ---- ours -------------------------------------------------------------------------------------------------------


def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def shapes_of(make) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in by_path(nnx.eval_shape(lambda: nnx.state(make()))).items()}


def by_path(state: nnx.State) -> dict:
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def build(make, table: tables.Table, tensors: dict[str, np.ndarray]):
    """The module that `make` describes, filled from torch tensors; nothing is initialised at random on the way."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    empty = by_path(state)
    leaves = tables.to_jax(table, tensors, {path: leaf.shape for path, leaf in empty.items()})
    for path, leaf in empty.items():
        leaf.set_value(jnp.asarray(leaves[path]))
    return nnx.merge(graphdef, state)


def compiled(model: nnx.Module, function):
    """`function(model, *arrays)` as a compiled function of the arrays; eager NNX would take most of the test's time."""
    graphdef, state = nnx.split(model)
    return lambda *arrays: call(function, graphdef, state, *arrays)


# Compiling is most of this file's time and every program runs once or twice, so LLVM need not optimise.
@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
def call(function, graphdef, state, *arrays):
    return function(nnx.merge(graphdef, state), *arrays)


def fresh_clip(cfg: config_lib.Encoder) -> Vit:
    return cfg.build(config_lib.Depths(), nnx.Rngs(0))


def our_vit(model: torch.nn.Module) -> Vit:
    return build(lambda: fresh_clip(MODEL.encoder), clip.table(MODEL.encoder), weights(model))


def our_llama(cfg: config_lib.Decoder, model: torch.nn.Module) -> Llama:
    return build(lambda: Llama(cfg, nnx.Rngs(0)), llama.table(cfg), weights(model))


def llama_logits(model: Llama, tokens, positions, segments):
    return model.logits(model(model.embed(tokens, jnp.float32), positions, segments))


def assert_close(what: str, ours, theirs, tolerance: float = TOLERANCE) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "a comparison of constants says nothing"
    worst = np.abs(np.asarray(ours) - theirs).max()
    print(f"{what}: max abs difference {worst:.1e} at a standard deviation of {theirs.std():.2f}")
    assert worst <= tolerance, f"{what}: max abs difference {worst}"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.decoder.vocab, shape)


# ---- (a) the visual encoder -------------------------------------------------------------------------------------


@torch.no_grad()
def test_vit_hidden_states_at_every_depth():
    theirs, pixels = torch_vit(MODEL.encoder), random(2, 20, 20, 3)
    states = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    ours = our_vit(theirs)
    every = tuple(range(MODEL.encoder.depth + 1))
    taps = compiled(ours, lambda m, x: m.hidden_states(x, every))(pixels)
    assert len(states) == len(taps) == MODEL.encoder.depth + 1
    for depth in every:
        assert_close(f"ViT depth {depth}", taps[depth], states[depth])
    some = compiled(ours, lambda m, x: m.hidden_states(x, (4, 1)))(pixels)
    assert sorted(some) == [1, 4]
    for depth in some:
        assert_close(f"ViT depth {depth}, read alone", some[depth], states[depth])


@torch.no_grad()
def test_convolutional_stem():
    cfg = dataclasses.replace(MODEL.encoder, image_size=16, patch=4, stem="conv")
    table = clip.table(cfg)
    rows = tables.Table(tuple(dataclasses.replace(row, path=row.path.removeprefix("stem/"))
                              for row in table.rows if row.path.startswith("stem/")))
    convs = [torch.nn.Conv2d(3, 32, 3, 2), torch.nn.Conv2d(32, 32, 3, 2)]
    stem = randomised(torch.nn.ModuleList([*convs, torch.nn.Linear(32, 32)]), 3)
    ours = build(lambda: ConvStem(cfg, nnx.Rngs(0)), rows,
                 {f"embeddings.stem.{name}": value for name, value in weights(stem).items()})
    images = random(2, 16, 16, 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for conv in convs:
        x = torch.nn.functional.gelu(conv(torch.nn.functional.pad(x, (0, 1, 0, 1))), approximate="tanh")
    assert_close("conv stem", compiled(ours, lambda m, x: m(x))(images), stem[2](x.flatten(2).transpose(1, 2)))


# ---- (b) the Q-Formers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_every", [1, 2])
@torch.no_grad()
def test_qformer(cross_every):
    cfg = dataclasses.replace(MODEL.qformer, cross_every=cross_every)
    theirs = TorchQFormer(cfg, 32, 48)
    ours = build(lambda: QFormer(cfg, 32, 48, nnx.Rngs(0)), mfam.qformer_table(cfg), weights(theirs))
    context = random(2, 17, 32)
    assert_close(f"Q-Former hidden, cross_every {cross_every}", compiled(ours, lambda m, x: m.hidden(x))(context),
                 theirs.hidden(torch.from_numpy(context)))
    context = 0.01 * context + 0.1  # such that the norm of the context and its epsilon matter
    assert_close(f"Q-Former output, cross_every {cross_every}", compiled(ours, lambda m, x: m(x))(context),
                 theirs(torch.from_numpy(context)))


@torch.no_grad()
@pytest.mark.parametrize("thematic", [config_lib.Thematic(), config_lib.Thematic(pool=2, norm=True)],
                         ids=["patches", "pooled"])
def test_mfam_three_levels_at_once_and_some_of_them(thematic):
    model = dataclasses.replace(MODEL, thematic=thematic)
    theirs = TorchMfam(model)
    ours = build(lambda: Mfam(model, nnx.Rngs(0)), mfam.table(model), weights(theirs))
    features = {part: random(2, 17, 32, seed=seed) for seed, part in enumerate(config_lib.PARTS)}
    expected = theirs({part: torch.from_numpy(value) for part, value in features.items()})
    run = compiled(ours, lambda m, states: m({part: Feature(x, 1) for part, x in states.items()}))
    assert_close("MFAM", run(features), expected)
    some = {part: features[part] for part in ("thematic", "middle", "high")}
    assert_close("MFAM without low", run(some), expected[:, MODEL.qformer.queries:])
    assert_close("MFAM, thematic only", run({"thematic": features["thematic"]}),
                 expected[:, 3 * MODEL.qformer.queries:])


# ---- (c) the language model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [MODEL.decoder, GROUPED], ids=["multi-head", "grouped-query"])
@torch.no_grad()
def test_llama_logits_padded_and_packed(cfg):
    theirs = torch_llama(cfg)
    logits = compiled(our_llama(cfg, theirs), llama_logits)

    # Two conversations of different lengths, padded to the right. 150 is more than one tile of the attention.
    tokens, lengths = random_tokens(2, 150), (150, 83)
    positions = np.broadcast_to(np.arange(150), (2, 150))
    real = (positions < np.array(lengths)[:, None]).astype(np.int32)
    expected = theirs(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(real)).logits
    padded = logits(tokens, positions, real)
    for row, length in enumerate(lengths):
        assert_close(f"LLaMA, row {row}", padded[row, :length], expected[row, :length])

    # Two conversations packed in one row, in either order and with padding behind, equal each of them alone.
    conversations = random_tokens(90, seed=1), random_tokens(41, seed=2)
    packed, positions, segments = np.zeros((3, 2, 150), int)
    for row, order in enumerate(((0, 1), (1, 0))):
        at = 0
        for segment, index in enumerate(order, 1):
            part = slice(at, at + len(conversations[index]))
            packed[row, part], positions[row, part] = conversations[index], np.arange(len(conversations[index]))
            segments[row, part], at = segment, part.stop
    together = logits(packed, positions, segments.astype(np.int32))
    alone = [theirs(input_ids=torch.from_numpy(tokens)[None]).logits[0] for tokens in conversations]
    for row, order in enumerate(((0, 1), (1, 0))):
        expected = torch.cat([alone[index] for index in order])
        assert_close(f"LLaMA, packed in the order {order}", together[row, :len(expected)], expected)


# ---- (d) all of CALM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_calm(count):
    """One row mentions every image in full; the other, shorter, only the last one by its Q-Former tokens."""
    theirs = TorchCalm(MODEL)
    ours = build(lambda: Calm(MODEL, nnx.Rngs(0)), whole.table(MODEL), weights(theirs))
    each = sum(MODEL.visual_tokens(part) for part in config_lib.PARTS)
    images = np.random.default_rng(0).integers(0, 256, (2, count, 20, 20, 3), np.uint8)
    text = np.full(4, -1)
    row = np.concatenate([text, *(np.r_[np.arange(i * each, (i + 1) * each), text] for i in range(count))])
    short = np.r_[text, (count - 1) * each + np.arange(3 * MODEL.qformer.queries), text]
    lengths, size = (len(row), len(short)), len(row)
    visual = np.stack([row, np.pad(short, (0, size - len(short)), constant_values=-1)])
    positions = np.broadcast_to(np.arange(size), (2, size))
    batch = {"images": images, "tokens": random_tokens(2, size), "visual": visual, "positions": positions,
             "segments": (positions < np.array(lengths)[:, None]).astype(np.int32)}
    run = compiled(ours, lambda m, batch: m.answer_logits(m(batch, config_lib.PARTS), batch["positions"]))
    logits = run(batch)
    for row, length in enumerate(lengths):
        expected = theirs(images[row], batch["tokens"][row, :length], visual[row, :length])
        assert_close(f"CALM, {count} images, row {row}", logits[row, :length], expected)


# ---- (e) cached generation --------------------------------------------------------------------------------------


def greedy(name, model, plain, theirs, prompts, lengths, new) -> np.ndarray:
    """Rows of prompts of these lengths, each with `new` greedy tokens after it: the same from the cache of `model`,
    from the whole sequence through `plain`, and by `generate` of `theirs`."""
    count, width = prompts.shape
    size = width + new

    def start(model, tokens, lengths):
        last, cache = model.prefill(model.embed(tokens, jnp.float32), lengths, new)
        return model.logits(last)[:, 0], cache

    def step(model, tokens, positions, done, cache):
        slots = jnp.arange(size)
        sees = (slots < lengths[:, None]) | ((slots >= width) & (slots <= width + done))
        x = model.embed(tokens[:, None], jnp.float32)
        hidden, cache = model.extend(x, positions[:, None], sees[:, None], cache, width + done)
        return model.logits(hidden)[:, 0], cache

    start, step, full = compiled(model, start), compiled(model, step), compiled(plain, llama_logits)
    logits, cache = start(prompts, lengths)
    sequences = np.zeros((count, size), int)
    sequences[:, :width] = prompts
    positions = np.broadcast_to(np.arange(size), (count, size))
    for done in range(new):
        written = lengths + done
        uncached = full(sequences, positions, (positions < written[:, None]).astype(np.int32))
        uncached = uncached[np.arange(count), written - 1]
        assert_close(f"{name}: logits of new token {done}, cached and not", logits, uncached)
        tokens = np.asarray(logits.argmax(-1))
        np.testing.assert_array_equal(tokens, uncached.argmax(-1))
        sequences[np.arange(count), written] = tokens
        logits, cache = step(tokens, written, done, cache)
    for row, length in enumerate(lengths):
        prompt = torch.from_numpy(prompts[row:row + 1, :length])
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)
        np.testing.assert_array_equal(sequences[row, :length + new], expected[0])
    return sequences


@pytest.mark.parametrize("cfg", [MODEL.decoder, GROUPED], ids=["multi-head", "grouped-query"])
@torch.no_grad()
def test_cached_greedy_decoding(cfg):
    theirs = torch_llama(cfg)
    ours, lengths = our_llama(cfg, theirs), np.array([3, 11, 6])
    greedy("LLaMA", ours, ours, theirs, random_tokens(3, lengths.max()), lengths, 8)


# ---- (f) the tables themselves ----------------------------------------------------------------------------------

ROUND_TRIPS = {
    "vit": (lambda: torch_vit(MODEL.encoder), lambda: fresh_clip(MODEL.encoder), clip.table(MODEL.encoder)),
    "qformer": (lambda: TorchQFormer(MODEL.qformer, 32, 48), lambda: QFormer(MODEL.qformer, 32, 48, nnx.Rngs(0)),
                mfam.qformer_table(MODEL.qformer)),
    "mfam": (lambda: TorchMfam(MODEL), lambda: Mfam(MODEL, nnx.Rngs(0)), mfam.table(MODEL)),
    "calm": (lambda: TorchCalm(MODEL), lambda: Calm(MODEL, nnx.Rngs(0)), whole.table(MODEL)),
    "llama": (lambda: torch_llama(GROUPED), lambda: Llama(GROUPED, nnx.Rngs(0)), llama.table(GROUPED)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_is_bit_exact_and_loads_strictly(name):
    theirs, make, table = ROUND_TRIPS[name]
    theirs, shapes = theirs(), shapes_of(make)
    tensors = weights(theirs)
    leaves = tables.to_jax(table, tensors, shapes)
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    back = tables.to_torch(table, leaves)
    constants = {constant.key for constant in table.constants}
    assert back.keys() == tensors.keys()
    for key in tensors.keys() - constants:
        assert back[key].dtype == tensors[key].dtype
        np.testing.assert_array_equal(back[key], tensors[key], err_msg=key)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)


def test_round_trip_keeps_bfloat16():
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in weights(torch_llama(GROUPED)).items()}
    leaves = tables.to_jax(llama.table(GROUPED), tensors, shapes_of(lambda: Llama(GROUPED, nnx.Rngs(0))))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for key, value in tables.to_torch(llama.table(GROUPED), leaves).items():
        assert value.tobytes() == tensors[key].tobytes(), key


@pytest.mark.parametrize("variant", config_lib.VARIANTS)
def test_every_leaf_of_every_variant_has_a_row(variant):
    cfg = config_lib.model(variant)
    shapes = {path: leaf.shape for path, leaf in Geometry.of(cfg).shapes.items()}
    entries, problems = tables.expand(whole.table(cfg), shapes)
    assert not problems
    assert len({entry.key for entry in entries}) == len(entries)
    count = {path: 0 for path in shapes}
    for entry in entries:
        count[entry.path] += np.prod(entry.shape)
    assert count == {path: np.prod(shape) for path, shape in shapes.items()}


def test_every_wrong_tensor_is_named_in_one_error():
    tensors = weights(torch_llama(MODEL.decoder))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((72, 48), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:60]
    shapes = shapes_of(lambda: Llama(MODEL.decoder, nnx.Rngs(0))) | {"blocks/q/lora/a": (3, 48, 2)}
    del shapes["norm/scale"]
    with pytest.raises(tables.WeightError) as error:
        tables.to_jax(llama.table(GROUPED), tensors, shapes)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight (72, 48)" in message
    assert "unexpected: model.layers.3.mlp.up_proj.weight (72, 48)" in message
    assert "wrong shape: lm_head.weight is (60, 48), the model needs (61, 48)" in message
    assert "blocks/q/lora/a" in message
    assert "no leaf norm/scale" in message
    with pytest.raises(tables.WeightError, match=re.escape("blocks/q/lora/a")):
        tables.to_torch(llama.table(GROUPED), {path: np.zeros(shape) for path, shape in shapes.items()})


def test_clip_keys_with_and_without_their_first_level():
    table, shapes, tensors = clip.table(MODEL.encoder), shapes_of(lambda: fresh_clip(MODEL.encoder)), {}
    tensors = weights(torch_vit(MODEL.encoder))
    leaves = tables.to_jax(table, tensors, shapes)
    old = {f"vision_model.{key}": value for key, value in tensors.items()}
    for path, leaf in tables.to_jax(table, old, shapes).items():
        np.testing.assert_array_equal(leaf, leaves[path])
    with pytest.raises(tables.WeightError, match="twice"):
        tables.to_jax(table, tensors | old, shapes)


def test_published_classes_are_read_in_full():
    """The names and shapes of whole CLIP, BLIP-2 and InstructBLIP models: all used, or ignored for a known reason."""
    vit, cfg = MODEL.encoder, MODEL.qformer
    tower = {"hidden_size": vit.width, "intermediate_size": vit.mlp_width, "num_hidden_layers": vit.depth,
             "num_attention_heads": vit.heads, "image_size": vit.image_size, "patch_size": vit.patch}
    queries = {"hidden_size": cfg.width, "intermediate_size": cfg.mlp_width, "num_hidden_layers": cfg.depth,
               "num_attention_heads": cfg.heads, "encoder_hidden_size": vit.width, "vocab_size": 11}
    words = {"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "vocab_size": 11}

    def found(model: str, config: str, **parts) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            state = getattr(transformers, model)(getattr(transformers, config)(**parts)).state_dict()
        return {key: tuple(tensor.shape) for key, tensor in state.items()}

    whole_clip = found("CLIPModel", "CLIPConfig", vision_config=tower,
                       text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                                    "vocab_size": 11})
    shapes = shapes_of(lambda: fresh_clip(vit))
    assert {entry.path for entry in tables.match(clip.table(vit), whole_clip, shapes).values()} == shapes.keys()

    shapes = shapes_of(lambda: QFormer(cfg, vit.width, 48, nnx.Rngs(0)))
    for family in ("Blip2", "InstructBlip"):
        whole = found(f"{family}ForConditionalGeneration", f"{family}Config", vision_config=tower,
                      qformer_config=queries, text_config=words, num_query_tokens=cfg.queries)
        entries = tables.match(mfam.qformer_table(cfg), whole, shapes)
        assert {entry.path for entry in entries.values()} == shapes.keys()

    # A part that no file has is left out knowingly, never by accident.
    bare = found("Blip2QFormerModel", "Blip2QFormerConfig", **queries)
    with pytest.raises(tables.WeightError, match=re.escape("missing: query_tokens (1, 3, 24)")):
        tables.match(mfam.qformer_table(cfg), bare, shapes)
    table = mfam.qformer_table(cfg).without(r"(context_norm|project)/.*|queries", "trained from scratch")
    assert len(tables.match(table, bare, shapes)) == len(bare)
    table = mfam.qformer_table(cfg).without(r"groups/blocks/0/cross/[kv]/kernel", "of another width")
    other = {key: (24, 1408) if re.search(r"crossattention.*(key|value)\.weight", key) else shape
             for key, shape in whole.items()}
    assert len(tables.match(table, other, shapes)) == len(entries) - 2 * cfg.depth // cfg.cross_every


def test_lavis_names():
    table, shapes = mfam.qformer_table(MODEL.qformer), shapes_of(lambda: QFormer(MODEL.qformer, 32, 48, nnx.Rngs(0)))
    theirs = {}
    for entry in tables.expand(table, shapes)[0]:
        key = entry.key.replace("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm.")
        key = key.replace("attention.attention.", "attention.self.").replace("qformer.", "Qformer.bert.")
        theirs[key.replace("language_projection", "llm_proj")] = entry.shape
    theirs["Qformer.bert.embeddings.word_embeddings.weight"] = (11, 24)
    theirs["visual_encoder.cls_token"] = (1, 1, 32)
    assert len(tables.match(table, theirs, shapes)) == len(theirs) - 2


# ---- (g) low-rank updates ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_is_pefts_formula_and_merges():
    cfg = config_lib.Lora(rank=4, alpha=10.0, targets=r"blocks/(q|k|v|o|gate|up|down)")
    theirs = torch_llama(GROUPED)
    ours = our_llama(GROUPED, theirs)
    tokens, positions = random_tokens(2, 20), np.broadcast_to(np.arange(20), (2, 20))
    inputs = (tokens, positions, np.ones((2, 20), np.int32))
    base = compiled(ours, llama_logits)(*inputs)

    lora.add(ours, cfg, nnx.Rngs(0))
    np.testing.assert_array_equal(compiled(ours, llama_logits)(*inputs), base)

    updated = {path: linear for path, linear in lora.linears(ours).items() if linear.lora is not None}
    assert set(updated) == {f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    for seed, (path, linear) in enumerate(updated.items()):
        linear.lora.b[...] = jnp.asarray(random(*linear.lora.b.shape, seed=seed) * np.float32(0.1))
        factors = np.array(linear.lora.a), np.array(linear.lora.b)
        for index, layer in enumerate(theirs.model.layers):
            part = layer.self_attn if path.split("/")[1] in "qkvo" else layer.mlp
            a, b = (torch.from_numpy(factor[index].T) for factor in factors)
            # PEFT: result + lora_B(lora_A(x)) * alpha / r, with A [r, in] and B [out, r].
            getattr(part, f"{path.split('/')[1]}_proj").register_forward_hook(
                lambda _, args, out, a=a, b=b: out + args[0] @ a.T @ b.T * (cfg.alpha / cfg.rank))
    changed = compiled(ours, llama_logits)(*inputs)
    assert np.abs(changed - base).max() > 0.1
    assert_close("LoRA against PEFT's formula", changed, theirs(input_ids=torch.from_numpy(tokens)).logits)

    lora.merge(ours)
    assert all(linear.lora is None for linear in lora.linears(ours).values())
    assert_close("LoRA merged", compiled(ours, llama_logits)(*inputs), changed, 1e-5)


def test_lora_targets_of_the_whole_model():
    cfg = dataclasses.replace(MODEL, lora=config_lib.Lora(rank=2))
    shapes = shapes_of(lambda: Calm(cfg, nnx.Rngs(0)))
    factors = {path: shape for path, shape in shapes.items() if "/lora/" in path}
    assert len(factors) == 14
    assert factors["decoder/blocks/down/lora/a"] == (3, 72, 2)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        nnx.eval_shape(lambda: Calm(dataclasses.replace(cfg, lora=config_lib.Lora(rank=2, targets="q")), nnx.Rngs(0)))
