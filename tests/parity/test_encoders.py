"""Random weights and images in; at every depth the same numbers from the transformers class of each encoder family, and
from ours, out.

Every parameter is drawn at random, norms, LayerScale and position embeddings too, so that none is left out unnoticed.
The tensors pass through files, for transformers renames those of DINOv2 between its files and its modules.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import test_conversion
import test_export
import transformers
from flax import nnx
from test_parity import assert_close, build, compiled, random, randomised, shapes_of

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.checkpoints import locate
from calm_jax.convert import families, hf_import, tables
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.errors import ConfigError
from calm_jax.inference.generate import Generator
from calm_jax.models import flops, vit
from calm_jax.models.parameters import Geometry, initial
from calm_jax.text import chat as chat_lib
from calm_jax.training import optimizer
from calm_jax.training.step import State, Step

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 35, "patch_size": 5,
         "layer_norm_eps": 0.03}
HIDDEN = {"intermediate_size": 56}
# name -> (config of the torch class, the class)
CASES = {
    "clip": (transformers.CLIPVisionConfig(hidden_act="quick_gelu", **HIDDEN, **SMALL), transformers.CLIPVisionModel),
    "clip gelu": (transformers.CLIPVisionConfig(hidden_act="gelu", **HIDDEN, **SMALL), transformers.CLIPVisionModel),
    "siglip": (transformers.SiglipVisionConfig(**HIDDEN, **SMALL), transformers.SiglipVisionModel),
    "dinov2": (transformers.Dinov2Config(mlp_ratio=2, **SMALL), transformers.Dinov2Model),
    "dinov2 giant": (transformers.Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **SMALL), transformers.Dinov2Model),
    "dinov2 registers": (transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **SMALL),
                         transformers.Dinov2WithRegistersModel),
}
SIZES = (35, 20, 55)  # the native grid of 7 x 7, and 4 x 4 and 11 x 11


def theirs(name: str) -> torch.nn.Module:
    """A torch model of random parameters, those at which the classes begin with zeros or ones not excepted."""
    config, kind = CASES[name]
    model = randomised(kind(config), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" in key or "position" in key or key.endswith("class_embedding"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if key.endswith("lambda1"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.25)
    return model


def saved(model: torch.nn.Module, folder) -> tuple[config_lib.Encoder, dict[str, np.ndarray]]:
    """Our config and the tensors of the folder that transformers writes."""
    model.save_pretrained(folder)
    found = json_files.table(folder / "config.json", remedy="")
    return families.read(found, "encoder"), {
        name: value.numpy() for name, value in safetensors_torch.load_file(folder / "model.safetensors").items()}


def ours(cfg: config_lib.Encoder, tensors: dict[str, np.ndarray]) -> vit.Vit:
    return build(lambda: fresh(cfg), families.of(cfg).table(cfg), tensors)


def fresh(cfg: config_lib.Encoder) -> vit.Vit:
    return cfg.build(config_lib.Depths(), nnx.Rngs(0))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_hidden_states_at_every_depth_and_size(name, tmp_path):
    model = theirs(name)
    native, tensors = saved(model, tmp_path)
    every = tuple(range(native.depth + 1))
    interpolate = {} if native.family == "dinov2" else {"interpolate_pos_encoding": True}
    for size in SIZES:
        cfg, pixels = native.resized(size), random(2, size, size, 3)
        assert (cfg.image_size, cfg.native) == (size, 35) and not cfg.wrong()
        states = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True,
                       **interpolate).hidden_states
        taps = compiled(ours(cfg, tensors), lambda m, x: m.hidden_states(x, every))(pixels)
        assert len(states) == len(taps) == native.depth + 1
        assert taps[0].shape[1] == cfg.part("low").tokens == cfg.prefix + (size // 5) ** 2
        for depth in every:
            assert_close(f"{name} at {size}, depth {depth}", taps[depth], states[depth])


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_matters(name, tmp_path):
    """A tensor that no depth depends on would be a row of the table that parity says nothing of."""
    cfg, tensors = saved(theirs(name), tmp_path)
    cfg = cfg.resized(20)
    graphdef, state = nnx.split(ours(cfg, tensors))
    grads = jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state, copy=True).hidden_states(
        jnp.asarray(random(1, 20, 20, 3)), (cfg.depth,))[cfg.depth]).sum())(state)
    still = {path for path, leaf in nnx.to_flat_state(grads) if not np.abs(np.asarray(leaf[...])).max() > 1e-6}
    assert {path[-2:] for path in still} <= {("k", "bias")}, still  # softmax does not see what all keys have in common


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_round_trip_is_bit_exact_and_loads_without_a_missing_tensor(name, tmp_path):
    model = theirs(name)
    cfg, tensors = saved(model, tmp_path / "theirs")
    cfg = cfg.resized(20)  # what is stored is of the native grid
    family, shapes = families.of(cfg), shapes_of(lambda: fresh(cfg))
    leaves = tables.to_jax(family.table(cfg), tensors, shapes)
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    back = tables.to_torch(family.table(cfg), leaves)
    constants = {constant.key for constant in family.table(cfg).constants}
    bare = {name.removeprefix(family.prefix): value for name, value in tensors.items()
            if not name.removeprefix(family.prefix).startswith("head.")}
    assert back.keys() == bare.keys() and constants <= bare.keys()
    for key in bare.keys() - constants:
        np.testing.assert_array_equal(back[key], bare[key], err_msg=key)
        assert back[key].dtype == bare[key].dtype
    assert {key: back[key].shape for key in constants} == {key: bare[key].shape for key in constants}

    folder = tmp_path / "ours"
    write(folder, cfg, back)
    again, info = CASES[name][1].from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    pixels = torch.from_numpy(random(1, 3, 35, 35))
    ends = [m(pixels, output_hidden_states=True).hidden_states[-1] for m in (model, again)]
    assert torch.equal(*ends)


def write(folder, cfg: config_lib.Encoder, tensors: dict[str, np.ndarray]) -> None:
    """As `calm export --parts` writes the encoder."""
    family = families.of(cfg)
    folder.mkdir()
    safetensors_torch.save_file({family.prefix + key: torch.from_numpy(value) for key, value in tensors.items()},
                                folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.published(cfg, {}) | {"torch_dtype": "float32"}))


OLD = """
import json, sys, numpy as np, torch, transformers
folder, kind, pixels, out = sys.argv[1:]
model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
assert transformers.__version__.startswith("4.46") and not info["missing_keys"] and not info["unexpected_keys"], info
more = {} if kind == "Dinov2Model" else {"interpolate_pos_encoding": True}
with torch.no_grad():
    states = model.eval()(torch.from_numpy(np.load(pixels)), output_hidden_states=True, **more).hidden_states
np.save(out, torch.stack(states).numpy())
"""


@pytest.mark.slow
@pytest.mark.skipif(not test_export.OLD.exists(), reason="make test-slow has a transformers of 4.46")
@pytest.mark.parametrize("name", [name for name in CASES if "registers" not in name])  # 4.46 has no class for them
def test_an_old_transformers_reads_what_we_write_and_computes_the_same(name, tmp_path):
    native, tensors = saved(theirs(name), tmp_path / "theirs")
    cfg, family = native.resized(20), families.of(native)
    leaves = tables.to_jax(family.table(cfg), tensors, shapes_of(lambda: fresh(cfg)))
    write(tmp_path / "ours", cfg, tables.to_torch(family.table(cfg), leaves))
    pixels = random(2, 20, 20, 3)
    np.save(tmp_path / "pixels.npy", pixels.transpose(0, 3, 1, 2))
    done = subprocess.run([str(test_export.OLD), "-c", OLD, tmp_path / "ours", CASES[name][1].__name__,
                           tmp_path / "pixels.npy", tmp_path / "states.npy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    every = tuple(range(cfg.depth + 1))
    taps = compiled(ours(cfg, tensors), lambda m, x: m.hidden_states(x, every))(pixels)
    for depth, expected in enumerate(np.load(tmp_path / "states.npy")):
        assert_close(f"{name} under 4.46, depth {depth}", taps[depth], expected)


# ---- the interpolation of position embeddings ---------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("stored", "wanted"), [(37, 16), (37, 8), (37, 24), (16, 37), (24, 27), (3, 7), (7, 1)])
def test_resampling_is_torch_s(stored, wanted, antialias):
    grid = random(5, stored, stored)
    expected = torch.nn.functional.interpolate(torch.from_numpy(grid)[None], (wanted, wanted), mode="bicubic",
                                               align_corners=False, antialias=antialias)[0].numpy()
    matrix = vit.resampling(stored, wanted, antialias)
    found = np.einsum("ih,jw,dhw->dij", matrix, matrix, grid)
    assert np.abs(found - expected).max() < 5e-5  # torch computes the places in float32
    assert np.abs(matrix.sum(1) - 1).max() < 1e-6


# ---- configs ------------------------------------------------------------------------------------------------------

DINOV2 = {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "mlp_ratio": 4, "hidden_act": "gelu"}


@pytest.mark.parametrize(("found", "expected"), [
    (DINOV2 | {"hidden_size": 384, "num_attention_heads": 6}, {"family": "dinov2"}),  # small is the default
    (DINOV2 | {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
     {"family": "dinov2", "width": 1536, "depth": 40, "heads": 24, "mlp_width": 4096, "activation": "swiglu"}),
    (DINOV2 | {"model_type": "dinov2_with_registers", "hidden_size": 1024, "num_hidden_layers": 24,
               "num_attention_heads": 16, "num_register_tokens": 4},
     {"family": "dinov2", "width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096, "registers": 4}),
    ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, {"family": "siglip"}),
    ({"model_type": "siglip", "vision_config": {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14}},
     {"family": "siglip", "image_size": 378, "patch": 14, "width": 1152, "depth": 27, "heads": 16, "mlp_width": 4304}),
    ({"model_type": "clip", "vision_config": {"hidden_act": "gelu", "image_size": 224, "patch_size": 32}},
     {"family": "clip", "image_size": 224, "patch": 32, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072,
      "activation": "gelu"}),
])
def test_published_geometries(found, expected):
    cfg = families.read(json_files.Table(found, "config.json"), "encoder")
    assert cfg == config_lib.encoder(**expected)
    published = families.of(cfg).published(cfg, {})
    assert families.read(json_files.Table(published, "config.json"), "encoder") == cfg


@pytest.mark.parametrize(("found", "reason"), [
    (DINOV2 | {"hidden_act": "relu"}, "hidden_act is 'relu' instead of gelu"),
    (DINOV2 | {"qkv_bias": False}, "its queries, keys and values have no bias"),
    (DINOV2 | {"image_size": 520}, "image_size 520 is no multiple of patch_size 14"),
    (DINOV2 | {"num_channels": 1}, "num_channels is 1 instead of 3"),
    (DINOV2 | {"mlp_ratio": 1e9}, r"mlp_ratio is 1e\+09"),
    ({"model_type": "dinov2_with_registers", "num_register_tokens": 0}, "num_register_tokens is 0 instead of"),
    ({"model_type": "siglip_vision_model", "hidden_act": "gelu"}, "hidden_act is 'gelu' instead of gelu_pytorch_tanh"),
    ({"model_type": "siglip_vision_model", "image_size": 8}, "image_size"),
    ({"model_type": "clip_vision_model", "hidden_act": "relu"}, "hidden_act is 'relu' instead of quick_gelu or gelu"),
    ({"model_type": "siglip2"}, "model_type is 'siglip2' instead of clip, .*siglip_vision_model"),
])
def test_what_is_not_computed_is_refused(found, reason):
    with pytest.raises(ConfigError, match=reason):
        families.read(json_files.Table(found, "config.json"), "encoder")


def test_an_mlp_that_no_published_class_has_is_not_written_alone():
    cfg = config_lib.encoder("dinov2", mlp_width=1500)
    assert families.of(cfg).published(cfg, {}) is None


# ---- conversion to another image size, and what the folder says of its images -------------------------------------


def test_conversion_for_another_image_size_and_normalisation(tmp_path):
    sources = test_conversion.parts(tmp_path)
    shutil.rmtree(tmp_path / "vit")
    cfg, _ = saved(theirs("dinov2 registers"), tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}))
    place = hf_import.convert(*sources, [], str(tmp_path / "out"), image_size=20)
    model = locate.find(str(place)).config.model
    assert model.encoder == dataclasses.replace(cfg, image_size=20, native_size=35, mean=(0.5, 0.5, 0.5),
                                                std=(0.25, 0.5, 0.5))
    assert Geometry.of(model).shapes["encoder/positions"].shape == (50, 32)
    assert model.visual_tokens("thematic") == 16
    with pytest.raises(ConfigError, match="image_size=21 is no multiple of patch=5"):
        hf_import.convert(*sources, [], str(tmp_path / "other"), image_size=21)
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5]}')
    with pytest.raises(ConfigError, match="are not three numbers each"):
        hf_import.convert(*sources, [], str(tmp_path / "other"))


# ---- the whole model ----------------------------------------------------------------------------------------------

TINY = {"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
WHOLE = {
    "dinov2": config_lib.encoder("dinov2", **TINY, native_size=40, registers=2),
    "dinov2 giant": config_lib.encoder("dinov2", **TINY, activation="swiglu"),
    "siglip": config_lib.encoder("siglip", **TINY, native_size=24),
    "clip": config_lib.encoder("clip", **TINY, native_size=40, activation="gelu"),
    "clip conv": config_lib.encoder("clip", **TINY, stem="conv"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_flops_of_an_image_are_those_of_the_traced_program(name):
    """Of one image more in a batch, for position embeddings are interpolated once."""
    model = dataclasses.replace(miniature.MODEL, encoder=WHOLE[name])
    geometry = Geometry.of(model)
    for parts in (config_lib.PARTS, ("low",)):
        counts = [flops.traced(jax.make_jaxpr(lambda parameters, images, parts=parts: geometry.bind(
            parameters).encoder.features(images, parts, dtype=jnp.float32))(
            geometry.shapes, jax.ShapeDtypeStruct((images, 32, 32, 3), jnp.uint8)).jaxpr) for images in (1, 2)]
        assert flops.encoder(model, parts).forward == counts[1] - counts[0]
        assert (counts[0] == counts[1] - counts[0]) == (model.encoder.native == 32)


@pytest.fixture
def quick_compilation():
    """These programs run for milliseconds; compiling them well takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", [name if name == "dinov2" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in WHOLE if "clip" not in name])
@pytest.mark.usefixtures("quick_compilation")
def test_a_whole_model_learns_and_scores(name):
    model, process = dataclasses.replace(miniature.MODEL, encoder=WHOLE[name]), miniature.process(
        parts=config_lib.PARTS, optimizer=config_lib.Optimizer(peak_lr=1e-3, weight_decay=0.1))
    geometry, chat = Geometry.of(model), chat_lib.load()
    tx, schedule = optimizer.make(process.optimizer, process.steps)
    step = Step(geometry, process, tx, schedule, jnp.float32, freeze_encoder=False, dropout=False, mesh=None)
    before = jax.jit(lambda key: initial(model, key))(jax.random.key(0))
    batch, train = miniature.batch(model, process), jax.jit(step.train)
    state, losses = State(jnp.zeros((), jnp.int32), before, tx.init(before)), []
    for _ in range(4):
        state, metrics = train(state, {}, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    seen = [path for path in before if path.startswith("encoder/")]
    assert any("registers" in path for path in seen) == (WHOLE[name].registers > 0)
    still = {path for path in seen if np.array_equal(before[path], state.trained[path])}
    assert not still, still
    photos = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mention = Sample((ImageRef(0),), (Turn((Mention(0), "How good is it?"), Answer("5.0")),))
    found = list(Generator(model, state.trained, chat).scores([(mention, 0)], photos.__getitem__))
    assert len(found) == 1 and 1 <= found[0].value <= 10
