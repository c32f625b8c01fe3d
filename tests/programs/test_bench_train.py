"""tools.bench train and tools.bench.gpu: both sides teach the same, frozen parts cost nothing, MFU is what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import sys

import jax
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.commands import plan
from calm_jax.data import pipeline
from calm_jax.errors import ConfigError
from calm_jax.models import flops
from calm_jax.models.parameters import Geometry
from calm_jax.training.setup import Setup
from tools.bench import contenders
from tools.bench import conversion as bench_conversion
from tools.bench import data as bench_data
from tools.bench import gpu as bench_gpu
from tools.bench import inference as bench_inference
from tools.bench import page as bench_page
from tools.bench import pictures as bench_pictures
from tools.bench import products as bench_products
from tools.bench import train as bench_train

torch = pytest.importorskip("torch", reason="torch is not here; make test has it")
bench_torch = pytest.importorskip("tools.bench.torch_side")

ALL = {"train": (r".*",), "freeze": ()}
SELF_SUPERVISED = {"train": (r"mfam/qformers/.*",), "freeze": (r"mfam/thematic/.*", r"encoder/.*", r"decoder/.*")}
GENERIC = {"train": (r"mfam/thematic/.*",), "freeze": (r"mfam/qformers/.*", r"encoder/.*", r"decoder/.*")}
FINETUNE = {"train": (r"mfam/.*", r"decoder/.*"), "freeze": (r"encoder/.*",)}
LORA = {"train": (r"mfam/.*", r"decoder/.*/lora/(a|b)"), "freeze": (r"encoder/.*", r"decoder/(?!.*/lora/).*")}


def config(rank: int = 0, remat: str = "none", **process) -> config_lib.Config:
    lora = config_lib.Lora(rank=rank, alpha=8.0, targets=r"decoder/blocks/(q|v|down)")
    process = {"parts": config_lib.PARTS, "row": config_lib.Row(tokens=96, images=2, answers=8), **process}
    return miniature.config(model=dataclasses.replace(miniature.MODEL, lora=lora, remat=remat),
                            processes={"only": miniature.process(**process)})


CASES = {"all": config(**ALL), "self-supervised": config(parts=config_lib.LEVELS, **SELF_SUPERVISED),
         "generic": config(parts=("thematic",), **GENERIC), "fine-tuning": config(remat="full", **FINETUNE),
         "lora": config(rank=4, remat="full", **LORA)}


def reference(of: config_lib.Config, device: str = "cpu") -> bench_torch.Reference:
    return bench_torch.Reference(of, bench_train.taught_parts(bench_train.learning(of)), torch.device(device))


# ---- the batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [CASES["all"], CASES["generic"], bench_gpu._config("finetune", "small", "comments")])
def test_the_batch_is_one_of_the_pipeline_and_full(of):
    process = of.processes[of.run[0]]
    of = dataclasses.replace(of, processes={of.run[0]: dataclasses.replace(process, batch=2)})
    batch, row = bench_train.make_batch(of), process.row
    blank = pipeline.blank(process, of.model, cached=False)
    assert {name: (value.shape[1:], value.dtype) for name, value in batch.items()} == {
        name: (value.shape, value.dtype) for name, value in blank.items()}
    count = batch["segments"].max()
    assert count == row.images and batch["images"].any((2, 3, 4)).all()
    seen = sum(of.model.visual_tokens(part) for part in process.parts)
    for number in range(1, count + 1):
        inside = batch["segments"][0] == number
        visual = batch["visual"][0, inside]
        assert visual[visual >= 0].tolist() == list(range((number - 1) * seen, number * seen))
        assert batch["positions"][0, inside].tolist() == list(range(inside.sum()))
    used = batch["weights"].sum(-1)[0] > 0
    places = batch["places"][0, used]
    assert used.sum() >= count and len(set(places.tolist())) == used.sum()
    assert (batch["visual"][0, places] < 0).all()  # answers are words, and the next token is in the same conversation
    assert (batch["segments"][0, places] == batch["segments"][0, places + 1]).all()


def test_a_row_that_holds_no_picture_is_refused():
    of = config(row=config_lib.Row(tokens=16, images=2, answers=8))
    with pytest.raises(ConfigError, match=r"row.tokens=16 does not hold the 22 visual tokens"):
        bench_train.make_batch(of)


# ---- what learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_both_sides_teach_the_same_and_nothing_else_gets_a_gradient(case):
    of = CASES[case]
    setup = Setup.of(of, "only", Geometry.of(of.model), sharding.make_mesh(of.mesh))
    ours = {path for path, learn in bench_train.learning(of).items() if learn}
    assert setup.trained.keys() == ours
    state, frozen, batch, key = setup.arguments()
    gradients, _ = jax.eval_shape(setup.step.gradients, state.trained, frozen, batch, key)
    assert gradients.keys() == ours
    moments = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.moments))
    assert 2 * sum(math.prod(setup.kept[path].shape) for path in ours) <= moments < 10 + 2 * sum(
        math.prod(setup.kept[path].shape) for path in ours)

    model = reference(of)
    model(bench_torch.arrays(bench_train.make_batch(of), torch.device("cpu"), of.model.encoder)).backward()
    taught = bench_train.taught_parts(bench_train.learning(of))
    for name, parameter in model.named_parameters():
        part = "lora" if "lora_" in name else name.split(".")[0]
        assert parameter.requires_grad == taught[part], name
        assert (parameter.grad is not None) == taught[part], name
        assert parameter.grad is None or "lora_A" in name or parameter.grad.any(), name  # lora_B starts at zero
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        math.prod(setup.kept[path].shape) for path in ours)


@pytest.mark.parametrize(("file", "variant", "process"), [
    ("finetune", "7b", "comments"), ("finetune", "7b+lora", "comments"), ("pretrain", "7b", "self_supervised"),
    ("pretrain", "7b", "generic"), ("finetune", "laptop", "comments"), ("finetune", "laptop+lora", "comments"),
    ("finetune", "1b", "comments"), ("pretrain", "laptop", "self_supervised"), ("pretrain", "laptop", "generic")])
def test_the_public_geometry_has_as_many_trained_parameters_on_both_sides(file, variant, process):
    of = bench_gpu._config(file, variant, process)
    shapes, learns = Geometry.of(of.model).shapes, bench_train.learning(of)
    model = reference(of, "meta")  # any device but the CPU: in an accelerator's dtypes
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        math.prod(shapes[path].shape) for path, learn in learns.items() if learn)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())


@pytest.mark.parametrize(("of", "sentence"), [
    (config(train=(r"mfam/.*", r"decoder/head/.*"), freeze=(r"encoder/.*", r"decoder/(?!head/).*")),
     r"of decoder/\* the process teaches a part: decoder/\S+ is frozen"),
    (dataclasses.replace(config(), model=dataclasses.replace(
        miniature.MODEL, lora=config_lib.Lora(rank=2, targets=r".*/(q|v)"))), "low-rank updates in the blocks of the"),
    (miniature.config(model=dataclasses.replace(miniature.MODEL, score_head=config_lib.ScoreHead(8)),
                      processes={"only": miniature.process(score_head=1.0)}), "has no regression head"),
    (miniature.config(model=dataclasses.replace(
        miniature.MODEL, encoder=dataclasses.replace(miniature.MODEL.encoder, activation="gelu"),
        decoder=dataclasses.replace(miniature.MODEL.decoder, qkv_bias=True))),
     r"not model\.encoder\.activation=gelu, model\.decoder\.qkv_bias=True; leave --against out"),
    (miniature.config(model=dataclasses.replace(miniature.MODEL, encoder=config_lib.encoder(
        "siglip", image_size=32, patch=8, width=32, depth=2, heads=2, mlp_width=64))),
     r"not model\.encoder\.family=siglip")])
def test_what_torch_cannot_do_alike_is_refused_before_anything_runs(of, sentence):
    with pytest.raises(ConfigError, match=sentence):
        bench_train.whole(of, bench_train.learning(of))


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def counted(of: config_lib.Config) -> tuple[float, float]:
    """FLOPs of a row's training step: of the products in the program that JAX traces, and by `flops.a_row`."""
    process = dataclasses.replace(of.processes[of.run[0]], batch=1)
    of = dataclasses.replace(of, model=dataclasses.replace(of.model, remat="none"), processes={of.run[0]: process})
    setup = Setup.of(of, of.run[0], Geometry.of(of.model), sharding.make_mesh(of.mesh))
    program = jax.make_jaxpr(setup.step.train)(*setup.arguments())
    return flops.traced(program.jaxpr), sum(flops.a_row(of.model, process, setup.learns).values())


def test_a_pre_training_step_computes_what_it_needs_and_no_more():
    """In the program itself, not only on paper: no gradient of what is frozen. The attention of the tiled backward pass
    computes its scores again, which is the rest of the difference."""
    found = {}
    for name in ("self_supervised", "generic"):
        of = bench_gpu._config("pretrain", "7b", name)
        everything = dataclasses.replace(of, processes={name: dataclasses.replace(of.processes[name], **ALL)})
        (found[name], paper), (whole, whole_paper) = counted(of), counted(everything)
        assert paper < found[name] < 1.12 * paper and whole_paper < whole < 1.12 * whole_paper
        assert found[name] < 0.72 * whole
    lora, paper = counted(bench_gpu._config("finetune", "7b+lora", "comments"))
    assert paper < lora < 1.12 * paper  # the updates' own products are not on paper


def test_mfu_is_model_flops_by_time_and_peak():
    device = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "count": 1}
    assert bench_train.peak_flops(device) == plan.CHIPS["h100"].peak == 989e12
    assert bench_train.peak_flops(device | {"kind": "NVIDIA H200", "count": 2}) == 2 * 989e12
    assert bench_train.peak_flops({"platform": "cpu", "kind": "cpu", "count": 1}) is None
    replies = [[{"seconds": seconds, "value": 1.0, "peak": 7}] for seconds in (30.0, 2.0, 4.0, 3.0)]
    played = contenders.Played(device, {"seconds": 5.0, "trained": 11}, replies)
    row = bench_train.row(played, {"rows": 4, "tokens": 600, "pictures": 6}, 900e12, 1000e12)
    assert row == {"median_s": 3.0, "min_s": 2.0, "max_s": 4.0, "first_s": 35.0, "tokens_per_s": 200.0,
                   "pictures_per_s": 2.0, "flop_per_s": 300e12, "mfu": 0.3, "peak_bytes": 7, "trained": 11, "loss": 1.0}


# ---- contenders ----------------------------------------------------------------------------------------------------

STAND_IN = """
import json, sys, time
name, platform, journal, *fails = sys.argv[1:]
def note(word): open(journal, "a").write(f"{name} {word}\\n")
print(json.dumps({"platform": platform, "kind": "x", "count": 1, "memory": None}), flush=True); note("begins")
if "building" in fails: print(json.dumps({"error": "out of memory"}), flush=True); sys.exit()
print(json.dumps({"seconds": 0.0}), flush=True)
for number, line in enumerate(sys.stdin):
    note(f"answers {json.loads(line)[0]}")
    if "killed" in fails: import os; os.kill(os.getpid(), 9)
    if "crashing" in fails: sys.exit(3)
    print(json.dumps({"seconds": 0.0, "value": number, "peak": 1}), flush=True)
"""


def played(tmp_path, platforms: dict[str, str], fails: dict[str, str], rounds: int = 2) -> tuple[dict, list[str]]:
    journal = tmp_path / "journal"
    commands = {name: [sys.executable, "-c", STAND_IN, name, platform, str(journal), *filter(None, [fails.get(name)])]
                for name, platform in platforms.items()}
    found = contenders.compete(commands, [["one"], ["two"]], rounds, say=lambda text: None)
    return found, journal.read_text().splitlines()


def test_contenders_take_turns_on_a_cpu_and_follow_each_other_on_an_accelerator(tmp_path):
    found, said = played(tmp_path, {"a": "cpu", "b": "cpu"}, {})
    assert said == ["a begins", "b begins", *[f"{name} answers {word}" for _ in range(2) for word in ("one", "two")
                                              for name in "ab"]]
    assert [[reply["value"] for reply in replies] for replies in found["b"].rounds] == [[0, 1], [2, 3]]
    (tmp_path / "gpu").mkdir()
    found, said = played(tmp_path / "gpu", {"a": "gpu", "b": "gpu"}, {})
    assert said == [f"{name} {what}" for name in "ab" for what in ("begins", *["answers one", "answers two"] * 2)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("fails", ["building", "killed"])
def test_a_contender_without_memory_is_a_result_and_the_other_goes_on(tmp_path, platform, fails):
    found, _ = played(tmp_path, {"a": platform, "b": platform}, {"a": fails})
    assert found["a"].error == "out of memory" and not found["b"].error and len(found["b"].rounds) == 2
    assert bench_train.row(found["a"], {}, 1.0, None) == {"error": "out of memory"}


def test_a_crash_and_different_devices_are_no_results(tmp_path):
    with pytest.raises(ConfigError, match="the contender a died"):
        played(tmp_path, {"a": "cpu"}, {"a": "crashing"})
    with pytest.raises(ConfigError, match="must share their device, and a has 1 gpu, b has 1 cpu"):
        played(tmp_path, {"a": "gpu", "b": "cpu"}, {})


# ---- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs_both_sides(capfd):
    of = CASES["lora"]
    result = bench_train.measure(of, against=True, rounds=2, depth=1)
    text = bench_train.show(result)
    ours, theirs = result["results"]["calm_jax"], result["results"]["torch"]
    for row in (ours, theirs):
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] < row["first_s"] and row["mfu"] is None
        assert row["peak_bytes"] > 2**27 and math.isfinite(row["loss"])
        assert row["flop_per_s"] == pytest.approx(sum(result["flops"].values()) / row["median_s"])
    assert ours["trained"] == theirs["trained"]
    assert (result["rows"], result["tokens"], result["pictures"]) == (2, 192, 4)
    assert "NOT the whole model: 1 of 2 blocks" in text and "calm_jax / torch: time " in text
    [cells] = bench_train.cells(result)
    assert cells[0].startswith("1 of 2 blocks of the language model: ") and "tokens/s" in cells[1]
    times = result["products"]["seconds"]
    left = (ours["median_s"] - times["calm_jax"] + times["torch"]) / theirs["median_s"]
    assert cells[2] == f"{ours['median_s'] / theirs['median_s']:.2f}; {left:.2f} with torch's products"
    assert f"with torch's products, time {left:.2f}" in text
    result["results"]["torch"] = {"error": "out of memory"}
    assert "out of memory" in bench_train.show(result) and bench_train.cells(result)[0][1:] == ["out of memory", "", ""]
    with pytest.raises(ConfigError, match="--depth 3: the language model has 2 blocks"):
        bench_train.measure(of, against=True, rounds=1, depth=3)


@pytest.mark.parametrize("name", ["all", "fine-tuning", "lora"])
def test_the_products_of_a_step_are_those_of_its_linear_layers(name):
    """Of the language model all but attention, of the encoder all but the patch embedding, of the MFAM none."""
    of = dataclasses.replace(CASES[name], model=dataclasses.replace(CASES[name].model, remat="none"))
    learns, model, process = bench_train.learning(of), of.model, of.processes["only"]
    found = bench_products.of_step(of, learns)
    language = process.batch * flops.language(model, process.row.tokens, process.row.answers).weights
    encoder = process.batch * process.row.images * flops.encoder(model).weights

    def work(of):
        return sum(2 * product.rows * product.inputs * product.outputs * of(product) for product in found)

    learned = encoder * (name == "all")
    for of, most in ((lambda one: one.forward, language + encoder), (lambda one: one.towards_input, language + learned),
                     (lambda one: one.towards_kernel, (language + learned) * (name != "lora"))):
        assert 0.6 * most <= work(of) <= most


def test_both_sides_multiply_what_a_step_multiplies():
    """The same numbers, whichever way a kernel lies: what is timed is what it says."""
    product = bench_products.Product(rows=5, inputs=4, outputs=3, forward=1, towards_input=2, towards_kernel=1)
    assert product.flops == 2 * 5 * 4 * 3 * 4
    ours, theirs = (side([product])() for side in (bench_products.jax_side, bench_products.torch_side))
    assert ours == pytest.approx(theirs, rel=1e-5) and ours != 0


# ---- the page ------------------------------------------------------------------------------------------------------


def test_a_row_goes_to_the_end_of_its_table(tmp_path):
    page = tmp_path / "page.md"
    source = (miniature.ROOT / "docs" / "benchmarks.md").read_text()
    page.write_text(source)
    for module in (bench_train, bench_inference, bench_data, bench_pictures, bench_conversion):  # has all
        bench_page.append(page, module.SECTION, module.COLUMNS, [["x"] * len(module.COLUMNS), ["y"] * len(
            module.COLUMNS)], date="today", machine="m", command="python -m c")
    written = page.read_text()
    rows = [line for line in written.splitlines() if line not in source.splitlines()]
    assert len(rows) == 10 and rows[0] == "| today | m | `python -m c` | x | x | x | x |"
    assert rows[1] == "| | | | y | y | y | y |"
    assert [line for line in written.splitlines() if line not in rows] == source.splitlines()
    section = written.partition(f"## {bench_data.SECTION}\n")[2].partition("\n## ")[0]
    assert re.search(r"\n\|.*\n\| today .*\n\| \| \| \| y .*\n\n", section)
    with pytest.raises(ConfigError, match="the table below '## Data' does not begin with"):
        bench_page.append(page, "Data", ("other",), [["x"]], date="d", machine="m", command="c")
    new = tmp_path / "new.md"
    for _ in range(2):
        bench_page.append(new, "Data", ("a", ""), [["x", ""]], date="d", machine="m", command="c")
    assert new.read_text().splitlines()[2:] == [
        "## Data", "", "| date | machine | command | a | |", "|---|---|---|---|---|", *["| d | m | `c` | x | |"] * 2]


def test_every_benchmark_fills_its_columns():
    side = {"median": 4.0, "min": 3.0, "max": 5.0}
    way = {"bytes": 2e9, "s": 4.0, "gb_per_s": 0.5, "copy_s": 2.0, "ratio": 2.0, "peak_anonymous_bytes": 2**30}
    taken = {"score_s": 0.5, "token_s_1": 0.1, "token_s_8": 0.025}
    answers = taken | {"rounds": {name: [value] for name, value in taken.items()}, "peak_bytes": 2**30}
    slower = {"score_s": 1.0, "rounds": answers["rounds"] | {"score_s": [1.0]}}
    inference = {"flops_score": 1e9, "results": {"calm_jax": answers, "torch": answers | slower}}
    rates = {"cold": [2.0, 4.0, 3.0], "warm": [20.0, 40.0, 33.0]}
    cells = {bench_pictures: bench_pictures.cells({"results": {"score": rates, "train": rates}}),
             bench_data: bench_data.cells({"cores": 2, "results": {"calm_jax": side, "torch": side | {"median": 2.0}}}),
             bench_conversion: bench_conversion.cells({"convert": way, "export": way}),
             bench_inference: bench_inference.cells(inference)}
    for module, rows in cells.items():
        assert all(len(row) == len(module.COLUMNS) for row in rows)
    assert cells[bench_data] == [["4.0 (3.0 to 5.0), 2.0 a core", "2.0 (3.0 to 5.0), 1.0 a core", "2.00"]]
    assert cells[bench_pictures][0] == ["score", "3.0 (2.0 to 4.0)", "33.0 (20.0 to 40.0)", "10.0"]
    assert cells[bench_conversion][0] == ["convert", "2.0 GB", "4.0 s (0.50 GB/s)", "2.0 s", "2.00", "1.00 GiB"]
    assert cells[bench_inference][2] == [
        "times as fast", *[f"{ratio} ({ratio} to {ratio})" for ratio in ("2.00", "1.00", "1.00")], "1.00 of its"]
    inference["results"]["torch"] = {"error": "out of memory"}
    assert bench_inference.cells(inference)[1:] == [["torch", "out of memory", "", "", ""]]


# ---- everything on one accelerator ---------------------------------------------------------------------------------

H100, H200 = 0.95 * 81_559 * 2**20, 0.95 * 143_771 * 2**20


def test_what_does_not_fit_a_device_gets_fewer_blocks_and_only_that():
    assert "--depth" not in bench_gpu.arguments("train", "7b", 4, 5, H200)
    words = bench_gpu.arguments("train", "7b", 4, 5, H100)
    depth = int(words[words.index("--depth") + 1])
    of = bench_gpu._config("finetune", "7b", "comments")
    room, each = H100 - bench_gpu.FREE, bench_gpu.TRAINED + bench_gpu.COPY
    assert bench_gpu.state(bench_train.with_depth(of, depth), each) <= room < bench_gpu.state(
        bench_train.with_depth(of, depth + 1), each)
    for name in ("lora", "pretrain", "inference"):
        assert "--depth" not in bench_gpu.arguments(name, "7b", 4, 5, H100)
    with pytest.raises(ConfigError, match="one block of the language model takes"):
        bench_gpu.arguments("train", "7b", 4, 5, 2**33)
    assert sum(word.startswith("--config.") for word in bench_gpu.arguments("pretrain", "tiny", 4, 5, None)) == 2


def test_what_a_device_holds_is_not_computed_again():
    keeps = "--config.model.remat=dots"
    for name, memory, kept in (("train", H200, True), ("train", H100, False), ("lora", H100, True),
                               ("pretrain", H100, True), ("lora", 2**35, False), ("lora", None, False)):
        assert (keeps in bench_gpu.arguments(name, "7b", 4, 5, memory)) == kept, (name, memory)
    assert keeps not in bench_gpu.arguments("train", "small", 4, 5, H200)  # which computes nothing again anyway


def test_torch_computes_again_what_it_cannot_hold(monkeypatch):
    asked = []

    def compete(commands, questions, rounds, *, twice):
        assert twice  # of two answers in a row the second counts
        of = [json.loads(command[4])["model"]["remat"] for command in commands.values()]
        asked.append(dict(zip(commands, of, strict=True)))
        built, reply = {"seconds": 1.0, "trained": 1}, [{"seconds": 1.0, "peak": 1, "value": 1.0}]
        device = {"platform": "gpu", "kind": "x", "count": 1, "memory": None}
        return {name: contenders.Played(device, built, [reply] * rounds, "out of memory" if name == "torch" and
                                        "calm_jax" in commands else "") for name in commands}

    monkeypatch.setattr(contenders, "compete", compete)
    monkeypatch.setattr(contenders, "stay_on_cpu", lambda: None)
    for remat, runs in (("dots", [{"calm_jax": "dots", "torch": "dots"}, {"torch": "full"}]),
                        ("full", [{"calm_jax": "full", "torch": "full"}])):
        asked.clear()
        result = bench_train.measure(config(remat=remat), against=True, rounds=1)
        assert asked == runs and result["torch_checkpointed"] == (remat == "dots")
        [[_, theirs, time, _]] = bench_train.cells(result)
        if remat == "dots":
            assert theirs.startswith(bench_train.CHECKPOINTED) and time == "1.00"
            assert bench_train.CHECKPOINTED in bench_train.show(result)
        else:
            assert theirs == "out of memory"


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    asked = []

    def run(words, folder, name):
        asked.append(name)
        if name == "lora":
            raise ConfigError("failed with exit code 1: something")
        error = {"error": "out of memory"} if name == "pretrain" else {}
        return {"results": {"calm_jax": error, "torch": {"error": "out of memory"}}}

    monkeypatch.setattr(bench_gpu, "run", run)
    wrong = bench_gpu.measure(list(bench_gpu.NAMES), "tiny", tmp_path, rows=1, rounds=1, memory=None)
    assert asked == list(bench_gpu.NAMES)
    assert wrong == ["lora: failed with exit code 1: something", "pretrain: out of memory"]
    assert "- lora: failed with exit code 1: something\n- pretrain: out of memory\n" in (
        tmp_path / "table.md").read_text()
    assert "python -m tools.bench train --config configs/finetune.py:tiny+lora --process comments" in (
        capsys.readouterr().out)


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch):
    monkeypatch.chdir(miniature.ROOT)
    with pytest.raises(ConfigError, match="exit code 2: error: there is no process 'nothing'"):
        bench_gpu.run(["train", "--config", "configs/finetune.py", "--process", "nothing"], tmp_path, "train")


@pytest.mark.slow
def test_a_result_is_written_and_added_to_the_table(tmp_path):
    small = {name: value for name, value in miniature.SMALL.items() if name in ("model", "processes", "run")}
    page, out = tmp_path / "table.md", tmp_path / "train.json"
    done = miniature.run(
        [sys.executable, "-m", "tools.bench", "train", "--config", "configs/pretrain.py", "--rows", "1",
         "--rounds", "1", "--out", str(out), f"--append={page}", *miniature.overrides(small)], miniature.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["process"] == "generic" and result["results"].keys() == {"calm_jax"}
    row = page.read_text().splitlines()[-1]
    assert row.startswith(f"| {result['date']} | {result['machine']} | `python -m tools.bench train --config ")
    assert "--out" not in row and "--append" not in row and str(pathlib.Path(tmp_path)) not in row
    assert np.isfinite(result["results"]["calm_jax"]["loss"])
