"""SmolLM2, TinyLlama, Llama 3.2, Qwen2.5 and Qwen3 as options of one LLaMA: their numbers, tokens, tables and configs.

As in test_parity: nothing is downloaded, every tensor is random, norms and biases too; float32 throughout.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import nnx
from test_parity import assert_close, compiled, greedy, llama_logits, randomised, shapes_of, weights

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.convert import families, hf_config, tables
from calm_jax.convert.families import llama as family
from calm_jax.errors import ConfigError
from calm_jax.models import flops, lora
from calm_jax.models.decoders.llama import Llama, LlamaConfig, frequencies
from calm_jax.models.parameters import Geometry
from calm_jax.training import optimizer

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
torch.set_num_threads(1)

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
COMMON = {"vocab_size": 67, "num_hidden_layers": 3, "rms_norm_eps": 0.02, "max_position_embeddings": 512,
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# name -> (class, what its config.json says); heads, ties, biases and frequencies are those of the model, sizes are not.
MODELS = {
    "SmolLM2": ("Llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3,
                          "intermediate_size": 80, "rope_theta": 1e5, "tie_word_embeddings": True}),
    "TinyLlama": ("Llama", {"hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
                            "intermediate_size": 88, "rope_theta": 1e4, "tie_word_embeddings": False}),
    "Llama 3.2": ("Llama", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                            "intermediate_size": 72, "rope_theta": 5e5, "rope_scaling": SCALED,
                            "tie_word_embeddings": True}),
    "Llama with wider heads": ("Llama", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                                         "head_dim": 20, "intermediate_size": 56, "tie_word_embeddings": False}),
    "Qwen2.5": ("Qwen2", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1,
                          "intermediate_size": 64, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                        "intermediate_size": 72, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                            "intermediate_size": 56, "rope_theta": 1e6, "sliding_window": None}),
}
OPTIONS = {"SmolLM2": {"tied"}, "TinyLlama": set(), "Llama 3.2": {"tied", "rope_factor", "rope_original"},
           "Llama with wider heads": {"head_dim"}, "Qwen2.5": {"tied", "qkv_bias"},
           "Qwen3": {"tied", "qk_norm", "head_dim"}, "Mistral": set()}


def torch_model(name: str, seed: int = 0) -> torch.nn.Module:
    kind, told = MODELS[name]
    cfg = getattr(transformers, f"{kind}Config")(**COMMON, **json.loads(json.dumps(told)), attn_implementation="sdpa")
    model = randomised(getattr(transformers, f"{kind}ForCausalLM")(cfg), seed)
    if cfg.tie_word_embeddings:  # drawn at the scale of a head's rows: it is one
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def read(found: dict) -> LlamaConfig:
    return families.read(json_files.Table(found, "config.json", error=hf_config.GeometryError), "language model")


def saved(model: torch.nn.Module, folder) -> dict:
    """The config.json that transformers writes."""
    model.config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def as_published(name: str) -> dict:
    """The config.json in the style of older transformers, as the hub has it."""
    kind, told = MODELS[name]
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "hidden_act": "silu", **COMMON, **told}


def stored(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors as save_pretrained writes them: of a tied pair, one."""
    found = weights(model)
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def ours(cfg: LlamaConfig, tensors: dict[str, np.ndarray]) -> Llama:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, nnx.Rngs(0))))
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    leaves = tables.to_jax(family.table(cfg), tensors, {path: leaf.shape for path, leaf in flat.items()})
    for path, leaf in flat.items():
        leaf.set_value(jnp.asarray(leaves[path]))
    return nnx.merge(graphdef, state)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, COMMON["vocab_size"], shape)


# ---- numbers and tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name):
    """300 tokens: more than a tile of attention, and several times the positions before the scaling."""
    theirs, cfg = torch_model(name), read(as_published(name))
    assert {option for option in dataclasses.asdict(cfg) if getattr(cfg, option) != getattr(LlamaConfig(), option)} - {
        "vocab", "width", "depth", "heads", "kv_heads", "mlp_width", "eps", "rope_theta", "positions"} == OPTIONS[name]
    tokens, positions = random_tokens(2, 300), np.broadcast_to(np.arange(300), (2, 300))
    lengths = np.array([300, 170])
    real = (positions < lengths[:, None]).astype(np.int32)
    expected = theirs(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(real)).logits
    found = compiled(ours(cfg, stored(theirs)), llama_logits)(tokens, positions, real)
    for row, length in enumerate(lengths):
        assert_close(f"{name}, row {row}", found[row, :length], expected[row, :length])


@pytest.mark.parametrize(("name", "options"), [
    ("Llama 3.2", {"rope_factor": 1.0}), ("Llama 3.2", {"rope_low_factor": 2.0}), ("Llama 3.2", {"rope_original": 32}),
    ("SmolLM2", {"rope_theta": 1e4})])
@torch.no_grad()
def test_the_comparison_sees_every_frequency(name, options):
    theirs, cfg = torch_model(name), dataclasses.replace(read(as_published(name)), **options)
    tokens, positions = random_tokens(1, 300), np.arange(300)[None]
    found = compiled(ours(cfg, stored(theirs)), llama_logits)(tokens, positions, np.ones((1, 300), np.int32))
    assert np.abs(found - theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()).max() > 0.05


def test_scaled_frequencies_are_those_of_llama_3():
    """Of the real Llama 3.2, whose three bands all have frequencies in them."""
    cfg = LlamaConfig(width=2048, heads=32, rope_theta=5e5, rope_factor=32.0)
    theirs = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=SCALED | {
        "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192})
    expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    assert factor == 1
    np.testing.assert_allclose(frequencies(cfg), expected, rtol=1e-6)
    share = frequencies(cfg) / frequencies(dataclasses.replace(cfg, rope_factor=1.0))
    assert (share == 1).any() and (share < 0.032).any() and ((share > 0.04) & (share < 0.9)).any()


@pytest.mark.parametrize(("name", "transposed"), [*((name, True) for name in MODELS), ("SmolLM2", False),
                                                  ("Qwen3", False)])
@torch.no_grad()
def test_greedy_tokens_cached_uncached_and_by_generate(name, transposed):
    """Prompts beyond the positions before the scaling; unrolled, kernels as CPUs or accelerators have them."""
    theirs, cfg, new = torch_model(name), read(as_published(name)), 12
    plain = ours(cfg, stored(theirs))
    model = nnx.clone(plain)
    model.unroll(transposed=transposed)
    lengths = np.array([9, 81, 44])
    sequences = greedy(name, model, plain, theirs, random_tokens(3, 81), lengths, new)
    said = {int(token) for row, length in enumerate(lengths) for token in sequences[row, length:length + new]}
    assert len(said) > 3  # randomly initialised models repeat themselves, and not all the same


def test_a_program_holds_no_tables_of_positions_that_it_never_sees():
    """Of a model of 131,072 positions; and a position beyond a row gives no plausible number."""
    cfg = dataclasses.replace(read(as_published("Llama 3.2")), positions=131_072)
    graphdef, state = nnx.split(Llama(cfg, nnx.Rngs(0)))

    def run(state, tokens, positions):
        return llama_logits(nnx.merge(graphdef, state), tokens, positions, jnp.ones_like(tokens))

    tokens, positions = jnp.zeros((1, 24), jnp.int32), jnp.arange(24)[None]
    constants = jax.make_jaxpr(run)(state, tokens, positions).consts
    assert sum(constant.nbytes for constant in constants) <= 2 * 24 * cfg.head_size // 2 * 4
    assert len(jax.jit(run).lower(state, tokens, positions).as_text()) < 200_000
    assert np.isfinite(run(state, tokens, positions)).all()
    assert np.isnan(run(state, tokens, positions + 1)[0, -1]).all()


# ---- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_round_trip_is_bit_exact_and_loads_strictly(name, dtype):
    theirs, cfg = torch_model(name), read(as_published(name))
    tensors = {key: value.astype(dtype) for key, value in stored(theirs).items()}
    shapes = shapes_of(lambda: Llama(cfg, nnx.Rngs(0)))
    leaves = tables.to_jax(family.table(cfg), tensors, shapes)
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    back = tables.to_torch(family.table(cfg), leaves)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == dtype and back[key].tobytes() == value.tobytes(), key
    if dtype == np.float32:
        state = {key: torch.from_numpy(value) for key, value in back.items()}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"] if cfg.tied else [], [])


def test_a_tied_head_that_is_there_twice_must_be_the_embedding():
    theirs, cfg = torch_model("SmolLM2"), read(as_published("SmolLM2"))
    shapes, both = shapes_of(lambda: Llama(cfg, nnx.Rngs(0))), weights(theirs)
    assert tables.to_jax(family.table(cfg), both, shapes).keys() == shapes.keys()
    with pytest.raises(tables.WeightError, match=r"lm_head.weight is not the same as model.embed_tokens.weight"):
        tables.to_jax(family.table(cfg), both | {"lm_head.weight": both["lm_head.weight"] + 1}, shapes)
    with pytest.raises(tables.WeightError, match=r"unexpected: model.layers.0.self_attn.q_proj.bias"):
        tables.to_jax(family.table(cfg), both | {"model.layers.0.self_attn.q_proj.bias": np.zeros(72)}, shapes)


# ---- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_configs_of_old_and_new_transformers_say_the_same(name, tmp_path):
    assert read(saved(torch_model(name), tmp_path)) == read(as_published(name))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_published_config_makes_the_same_model_again(name, tmp_path):
    theirs, cfg = torch_model(name), read(as_published(name))
    special = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": 0}
    written = family.published(cfg, special)
    assert read(written) == cfg
    assert read({key: value for key, value in written.items() if key != "rope_parameters"}) == cfg  # as old ones do
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).eval()
    assert type(again).__name__ == written["architectures"][0] == {
        "Mistral": "LlamaForCausalLM"}.get(name, type(theirs).__name__)
    missing, unexpected = again.load_state_dict({key: torch.from_numpy(value) for key, value in stored(theirs).items()},
                                                strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if cfg.tied else [], [])
    tokens = torch.from_numpy(random_tokens(1, 150))
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


def test_no_published_class_holds_every_combination():
    cfg = read(as_published("Qwen2.5"))
    assert family.published(dataclasses.replace(cfg, qk_norm=True), {}) is None
    assert family.published(dataclasses.replace(cfg, head_dim=16), {}) is None
    cfg = read(as_published("Llama with wider heads"))
    assert family.published(dataclasses.replace(cfg, width=50), {}) is None
    assert family.published(dataclasses.replace(cfg, width=50, qk_norm=True), {})["model_type"] == "qwen3"


@pytest.mark.parametrize(("name", "gone", "expected"), [
    ("SmolLM2", "tie_word_embeddings", {"tied": False}), ("Qwen2.5", "tie_word_embeddings", {"tied": False}),
    ("Qwen3", "tie_word_embeddings", {"tied": False}), ("Qwen3", "head_dim", {"head_dim": 128}),
    ("SmolLM2", "num_key_value_heads", {"kv_heads": 9}), ("Qwen2.5", "max_position_embeddings", {"positions": 32_768}),
    ("SmolLM2", "max_position_embeddings", {"positions": 2048}), ("Qwen3", "rope_theta", {"rope_theta": 1e4}),
    ("Mistral", "max_position_embeddings", {"positions": 131_072}), ("Qwen3", "rms_norm_eps", {"eps": 1e-6})])
def test_what_a_config_leaves_out_is_what_its_class_assumes(name, gone, expected):
    """As our copy of transformers has it."""
    found = {field: value for field, value in as_published(name).items() if field != gone}
    cfg = read(found)
    assert {field: getattr(cfg, field) for field in expected} == expected
    theirs = getattr(transformers, f"{MODELS[name][0]}Config")(**{
        field: value for field, value in found.items() if field not in ("architectures", "model_type")})
    value = theirs.rope_parameters["rope_theta"] if gone == "rope_theta" else getattr(theirs, gone)
    assert [value] == list(expected.values())


def test_keys_that_a_config_leaves_out_or_has_as_null():
    """Absent, Qwen's class assumes 32; null is as many as queries."""
    found = as_published("Qwen2.5") | {"num_attention_heads": 64, "hidden_size": 512}
    del found["num_key_value_heads"]
    assert read(found).kv_heads == 32 and read(found | {"num_key_value_heads": None}).kv_heads == 64


@pytest.mark.parametrize(("name", "changes", "reason"), [
    ("Qwen2.5", {"use_sliding_window": True}, "sees a sliding window alone"),
    ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sees a sliding window alone"),
    ("Mistral", {"sliding_window": 256}, "sees a sliding window alone"),
    ("Llama 3.2", {"partial_rotary_factor": 0.5}, r"a part of its channels alone \(partial_rotary_factor 0.5\)"),
    ("Qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
     r"a part of its channels alone \(partial_rotary_factor 0.25\)"),
    ("Qwen2.5", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
     r"rotary frequencies are scaled \('yarn'\), and only 'llama3' is computed"),
    ("SmolLM2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"are scaled \('linear'\)"),
    ("SmolLM2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"are scaled \('dynamic'\)"),
    ("Qwen3", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, r"are scaled \('longrope'\)"),
    ("Llama 3.2", {"rope_parameters": SCALED | {"factor": 4.0}}, "in different ways"),
    ("Llama 3.2", {"rope_parameters": {"rope_type": "default"}}, "in different ways"),
    ("Llama 3.2", {"rope_scaling": SCALED | {"type": "default"}}, "in different ways"),
    ("Llama 3.2", {"rope_scaling": SCALED | {"factor": 0.5}}, "factor of its rotary scaling is 0.5, below 1"),
    ("Llama 3.2", {"rope_scaling": SCALED | {"high_freq_factor": 1.0}},
     "high_freq_factor 1 is not above its low_freq_factor 1"),
    ("Llama 3.2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "there is no low_freq_factor"),
    ("Qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rotary frequencies of their own"),
    ("Qwen3", {"attention_bias": True}, "its linear layers have biases"),
    ("SmolLM2", {"attention_bias": True}, "its linear layers have biases"),
    ("SmolLM2", {"mlp_bias": True}, "its linear layers have biases"),
    ("Qwen2.5", {"hidden_act": "gelu"}, "hidden_act is 'gelu' instead of silu"),
    ("SmolLM2", {"hidden_size": 70}, "hidden_size 70 is no multiple of num_attention_heads 9"),
    ("SmolLM2", {"head_dim": 15}, "its heads have 15 channels, an odd number"),
    ("Qwen3", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ("Qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe' instead of llama, mistral, qwen2 or qwen3"),
    ("Qwen3", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes' instead of true or false"),
])
def test_what_is_not_computed_is_refused_in_one_sentence(name, changes, reason):
    with pytest.raises(hf_config.GeometryError, match=reason) as error:
        read(as_published(name) | changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json: ")


@pytest.mark.parametrize(("changes", "field"), [
    ({"rope_factor": 0.5}, "rope_factor=0.5"), ({"rope_original": 0}, "rope_original=0"),
    ({"rope_low_factor": 0.0}, "rope_low_factor"), ({"head_dim": -2}, "head_dim=-2"),
    ({"head_dim": 15}, "a head has 15 channels"), ({"tied": 1}, "tied takes True or False"),
    ({"rope_factor": 2.0, "rope_high_factor": 1.0}, "rope_high_factor=1 is not above rope_low_factor=1"),
    ({"width": 4097}, "width=4097 is no multiple of heads=32, nor is head_dim set")])
def test_options_that_cannot_be_are_refused_by_name(changes, field):
    with pytest.raises(ConfigError, match=field):
        config_lib.from_config_dict(config_lib.to_config_dict(config_lib.Config(
            model=config_lib.Model(decoder=config_lib.decoder("llama", **changes)))))


# ---- what depends on the geometry -------------------------------------------------------------------------------


def test_vicunas_parameters_are_what_they_were():
    paths = {path for path in Geometry.of(config_lib.model("7b")).shapes if path.startswith("decoder/")}
    assert paths == {"decoder/embedding", "decoder/head/kernel", "decoder/norm/scale", *(
        f"decoder/blocks/{name}" for name in ("attention_norm/scale", "mlp_norm/scale", *(
            f"{linear}/kernel" for linear in ("q", "k", "v", "o", "gate", "up", "down"))))}


@pytest.mark.parametrize("name", ["SmolLM2", "Qwen2.5", "Qwen3"])
def test_flops_are_those_of_the_traced_program(name):
    cfg = read(as_published(name))
    model = dataclasses.replace(config_lib.model("tiny"), decoder=cfg)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, nnx.Rngs(0))))
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    program = jax.make_jaxpr(lambda state, *ids: llama_logits(nnx.merge(graphdef, state), *ids))(state, ids, ids, ids)
    work = flops.language(model, 64, 64)
    # In one tile of attention all pairs are computed, of which half count.
    assert flops.traced(program.jaxpr) == work.weights + 2 * work.attention


def test_a_fresh_tied_model_begins_with_logits_of_unit_variance():
    cfg = dataclasses.replace(read(as_published("SmolLM2")), width=288, vocab=512)
    tokens = np.random.default_rng(0).integers(0, 512, (4, 40))
    logits = compiled(Llama(cfg, nnx.Rngs(0)), llama_logits)(tokens, np.broadcast_to(np.arange(40), (4, 40)),
                                                             np.ones((4, 40), np.int32))
    assert 0.8 < float(logits.std()) < 1.3


def test_every_option_has_its_place_in_training():
    """LoRA on every linear layer, none of which is a tied head; weight decay on kernels and the table alone."""
    cfg = dataclasses.replace(read(as_published("Qwen3")), qkv_bias=True)
    model = dataclasses.replace(config_lib.model("tiny"), decoder=cfg,
                                lora=config_lib.Lora(rank=2, targets=r"decoder/.*"))
    shapes = {path: leaf.shape for path, leaf in Geometry.of(model).shapes.items() if path.startswith("decoder/")}
    assert {lora.factors(path)[0] for path in shapes if path.endswith("kernel")} == {
        path for path in shapes if path.endswith("lora/a")}
    assert shapes["decoder/blocks/q/lora/b"] == (3, 2, 64) and shapes["decoder/blocks/o/lora/a"] == (3, 64, 2)
    assert "decoder/head/kernel" not in shapes and shapes["decoder/blocks/q_norm/scale"] == (3, 16)
    assert {path for path in shapes if not optimizer.decays(path)} == {path for path in shapes if path.endswith(
        ("scale", "bias"))} and optimizer.decays("decoder/embedding")
