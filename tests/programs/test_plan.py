"""tools.plan: what is read out of compiled programs, whole plans on simulated devices, and, where the TPU compiler is
there, a real program for TPUs that nobody owns."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import miniature
import pytest

from calm_jax import config as config_lib
from calm_jax.commands import plan
from calm_jax.errors import ConfigError
from calm_jax.models import flops
from calm_jax.models.parameters import Geometry
from calm_jax.training import filters

LIBTPU = (pathlib.Path(sys.prefix) / "libtpu").is_dir()

HLO = """HloModule jit_train

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered.1 = bf16[8,64]{1,0} all-gather(%x), channel_id=1, dimensions={1}
  %start.1 = (f32[4,4]{1,0}, f32[4,16]{1,0}) all-gather-start(%y), channel_id=2
  %done.1 = f32[4,16]{1,0} all-gather-done(%start.1)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%first_half (p: f32[2]) -> f32[2] {
  %spread.1 = f32[2,8]{1,0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="3"}
}

%second_half (p: f32[2]) -> f32[2] {
  %spread.2 = f32[2,8]{1,0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="3"}
}

ENTRY %main.1 (a: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %n = (s32[], f32[8]{0}) while(%i), condition=%other, body=%body2, backend_config={"known_trip_count":{"n":"5"}}
  %one = f32[2]{0} fusion(%a), kind=kCustom, calls=%first_half
  %two = f32[2]{0} fusion(%a), kind=kCustom, calls=%second_half
  ROOT %sum = f32[8,4]{1,0} all-reduce(%a), to_apply=%add
}

%body2 (p: f32[2]) -> f32[2] {
  %there = f32[100]{0} collective-permute(%p), channel_id=9
}
"""


def test_collectives_count_as_often_as_their_loops_turn_and_once_where_they_are_spread():
    found = plan.collectives(HLO)
    assert found == {"all-gather": (32 + 32 + 1, 32 * (8 * 64 * 2 + 4 * 16 * 4) + 2 * 8 * 4),
                     "collective-permute": (5, 5 * 400), "all-reduce": (1, 8 * 4 * 4)}


@pytest.mark.parametrize(("spec", "kind", "slices", "shape"), [
    ("v5e-16", "v5e", 1, "4x4"), ("v5e:4x4", "v5e", 1, "4x4"), ("2xv5e-16", "v5e", 2, "4x4"),
    ("v5p-8", "v5p", 1, "2x2x1"), ("v6e-8", "v6e", 1, "2x4"), ("v4:2x2x4", "v4", 1, "2x2x4"),
    ("a100:8", "a100", 1, "8"), ("cpu:8", "cpu", 1, "8")])
def test_topologies_are_read(spec, kind, slices, shape):
    assert plan.Topology.of(spec) == plan.Topology(kind, slices, shape, spec)


@pytest.mark.parametrize("spec", ["v9e-16", "v5e-17", "a100", "a100-8", "v5e", "x2v5e-16"])
def test_what_is_no_topology_is_refused(spec):
    with pytest.raises(ConfigError, match=f"(--topology {spec}|write --topology)"):
        plan.Topology.of(spec)


def test_the_knob_is_that_of_what_fills_the_memory():
    config = config_lib.Config(model=config_lib.model("7b"))
    process = config_lib.Process(batch=128)
    found = {"bytes": {"trained parameters": 30 * plan.GIB, "optimizer": 60 * plan.GIB, "frozen parameters": 1.0},
             "capacity": 16 * plan.GIB, "devices": 8, "inference": False, "process": "scores",
             "mesh": {"data": 1, "fsdp": 8, "tensor": 1}}
    assert "take 64 devices, or low-rank updates" in plan.advice(found, config, process)
    held = found | {"bytes": {"trained parameters": 1.0, "optimizer": 2.0, "frozen parameters": 3 * plan.GIB}}
    assert "accumulate=2 halves the rows at a time (now 16 a device)" in plan.advice(held, config, process)
    one = config_lib.Process(batch=8)
    assert "mesh.tensor=2" in plan.advice(held, config, one)
    assert "give fewer --rows" in plan.advice(held | {"inference": True}, config, process)


# ---- FLOPs -------------------------------------------------------------------------------------------------------


def work(file: str, name: str, variant: str = "7b") -> dict[str, float]:
    import runpy
    config = config_lib.from_config_dict(
        runpy.run_path(str(miniature.ROOT / "configs" / f"{file}.py"))["get_config"](variant))
    process = config.processes[name]
    return flops.a_row(config.model, process, filters.trainable(Geometry.of(config.model).shapes, process))


def test_flops_of_whole_training_are_six_a_weight_and_token():
    model, row = config_lib.model("7b"), config_lib.Row()
    llm = flops.language(model, row.tokens, row.answers)
    assert llm.weights == pytest.approx(2 * 6.476e9 * 2048 + 2 * 256 * 4096 * 32_000, rel=1e-3)
    found = work("finetune", "scores")
    assert found["weights"] / found["forward"] < 1  # the encoder is frozen
    seen = 3 * (flops.qformers(model).forward + flops.thematic(model).forward) + flops.encoder(model).forward
    assert sum(found.values()) == pytest.approx(3 * llm.forward + llm.attention + row.images * seen, rel=0.02)


def test_what_is_frozen_costs_no_gradient_of_its_weights():
    pairs, self_supervised, whole = work("pretrain", "generic"), work("pretrain", "self_supervised"), work(
        "finetune", "scores")
    assert pairs["weights"] < 0.01 * whole["weights"] and self_supervised["weights"] < 0.05 * whole["weights"]
    lora = work("finetune", "scores", "7b+lora")
    assert lora["forward"] == whole["forward"] and lora["inputs"] == whole["inputs"]
    assert lora["weights"] < 0.05 * whole["weights"]
    assert sum(lora.values()) < 0.7 * sum(whole.values())


# ---- whole plans -------------------------------------------------------------------------------------------------


def planned(tmp_path: pathlib.Path, *words: str) -> tuple[dict, str]:
    out = tmp_path / "plan.json"
    done = miniature.run([sys.executable, "-m", "tools.plan", "--out", str(out), *words], miniature.environment())
    assert done.returncode in (0, 1) and out.is_file(), done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_a_plan_for_simulated_devices(tmp_path):
    found, text = planned(tmp_path, "--config", "configs/finetune.py:tiny", "--topology", "a100:8",
                          "--config.processes.scores.batch=16")
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and found["fits"]
    shapes = Geometry.of(config_lib.model("tiny")).shapes
    count = sum(math.prod(leaf.shape) for leaf in shapes.values())
    assert 4 * count / 8 < found["bytes"]["trained parameters"] < 4 * count / 4  # some dimensions do not divide
    assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["trained parameters"], rel=0.01)
    assert found["collectives"]["all-gather"][1] > count and "training step of scores" in text
    scorer, text = planned(tmp_path, "--config", "configs/finetune.py:tiny", "--topology", "cpu:2", "--inference")
    assert scorer["flops"].keys() == {"forward"} and "scorer" in text
    assert scorer["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2}


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="the TPU compiler is not here; make plan-env fetches it")
def test_a_plan_by_the_tpu_compiler_uses_the_splash_kernel_and_holds_no_scores(tmp_path):
    length = 512
    found, text = planned(
        tmp_path, "--config", "configs/finetune.py:tiny", "--topology", "v5e-4", "--config.processes.scores.batch=4",
        f"--config.processes.scores.row.tokens={length}", "--config.model.decoder.heads=1",
        "--config.model.decoder.kv_heads=1", "--hlo", str(tmp_path / "hlo.txt"))
    assert found["fits"] and found["devices"] == 4 and "v5e-4: 4 devices" in text
    hlo = (tmp_path / "hlo.txt").read_text()
    assert "splash" in hlo and f"{length},{length}]" not in hlo
    assert found["bytes"]["trained parameters"] < found["total"] < found["capacity"]


def test_wrong_use_is_answered_in_a_sentence():
    for words, sentence in ((("--topology", "v9-1"), "none that is known"), ((), "--topology is missing"),
                            (("--topology", "cpu:2", "--process", "score"), "the nearest is 'scores'")):
        done = miniature.run([sys.executable, "-m", "tools.plan", "--config", "configs/finetune.py", *words],
                             miniature.environment())
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
