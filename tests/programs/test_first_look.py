"""tools.studies.first_look: arms of equal size, commands in the order of what they need, and a page of figures."""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import miniature
import psutil
import pytest

from calm_jax import recipes
from calm_jax.commands import steps as commands
from calm_jax.errors import ConfigError
from tools.studies import first_look


def variant(name):
    return recipes.load(f"{first_look.CONFIG}:{name}").config


def test_all_arms_take_the_same_number_of_steps_of_the_same_shape():
    shapes, steps = set(), {}
    for name in ("scores", "self_supervised", "then_scores"):
        config = variant(name)
        shapes |= {(config.model, process.row.tokens, process.batch, process.parts)
                   for process in config.processes.values()}
        steps[name] = sum(process.steps for process in config.processes.values())
    assert len(shapes) == 1 and steps["scores"] == steps["self_supervised"] + steps["then_scores"]
    with pytest.raises(ConfigError, match="no variant 'score'; the nearest is 'scores'"):
        variant("score")


def test_the_commands_are_those_of_the_arms(tmp_path):
    plan = first_look.plan(tmp_path, "data")
    lines = {name: shlex.join(step.arguments) for name, (step, _) in plan.items()}
    assert "train_share=0.1" in lines["b-tenth"] and "train_share" not in lines["b-all"]
    assert f"--config.init={tmp_path}/taught" in lines["b-tenth"] and "init" not in lines["a-all"]
    assert "shuffle_labels=True" in lines["shuffled"] and f"--config.init={tmp_path}/shuffled" in lines["c-all"]
    assert "freeze=" in lines["frozen"] and "freeze=" in lines["d-all"]
    short = {name: shlex.join(step.arguments) for name, (step, _) in first_look.plan(tmp_path, "data", 40).items()}
    assert "scores.steps=40" in short["a-all"] and "scores.steps=20" in short["b-all"]
    assert "language.steps=4" in short["taught"] and "self_supervised.steps=16" in short["taught"]
    order = list(plan)
    assert all(order.index(need) < order.index(name) for name, (_, needs) in plan.items() for need in needs)


def test_commands_wait_for_what_they_need_and_a_failure_stops_them(tmp_path):
    def step(name, *arguments):
        return commands.Step(name, arguments, tmp_path / name, (), tmp_path / f"{name}.log")

    plan = {"first": (step("first", "compileall", "-q", str(tmp_path / "nothing")), ()),
            "fails": (step("fails", "calm_jax.train", "--nonsense"), ("first",)),
            "never": (step("never", "calm_jax.config"), ("fails",))}
    assert first_look.run(plan, tmp_path, beside=2) not in (0, None)
    spent = json.loads((tmp_path / "seconds.json").read_text())
    assert "never" not in spent and not (tmp_path / "never.log").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_it_started_does_not_outlive_it(tmp_path, sent, code):
    program = f"""
import pathlib, sys
from calm_jax.commands import steps as commands
from tools.studies import first_look
folder = pathlib.Path({str(tmp_path)!r})
server = commands.Step("server", ("http.server", "0", "--bind", "127.0.0.1"), folder / "x", (), folder / "server.log")
sys.exit(first_look.run({{"server": (server, ())}}, folder, 1))
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=miniature.ROOT, stderr=subprocess.PIPE, text=True)
    while not (started := psutil.Process(child.pid).children()):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    time.sleep(1)  # it waits by now
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in said, said
    assert not any(process.is_running() for process in started)


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    step = commands.Step("a", (), tmp_path / "metrics.jsonl")
    for text, said in (("", ""), ('{"step": 1', ""), ('{"step": 1}\n', "step 1"), ('{"step": 1}\n{"st', "step 1")):
        step.result.write_text(text)
        assert first_look._progress(step) == said


def fake(tmp_path):
    """Results as the evaluations write them."""
    results = {}
    for place, arm in enumerate(first_look.ARMS):
        for reader in first_look.READERS:
            value = None if (arm, reader) == ("a-tenth", "text") else 0.1 * place
            results[f"{arm}-{reader}"] = {"table": {
                "plcc": value, "srcc": value, "parse_failures": 0.125, **({} if value is None else {
                    "plcc_interval": [value - 0.05, value + 0.05], "srcc_interval": [value - 0.05, value + 0.05]})}}
    for place, name in enumerate(first_look.FIRST):
        results[f"{name}-attributes"] = {"table": [
            {"kind": "grade", "subject": "noise", "level": "low", "n": 40, "accuracy": 0.9 - 0.2 * place,
             "majority": 0.5, "gain": 0.4, "gain_interval": [0.3, 0.5]}]}
    for name in (*first_look.FIRST, *first_look.ARMS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(
            {"process": "p", "step": step, "kind": kind, "loss": 2 / step}) + "\n"
            for step in (1, 2) for kind in ("train", "validation")))
    return results


def test_the_table_and_the_plot(tmp_path):
    results = fake(tmp_path)
    trees = {"trees-all": {"plcc": 0.5, "plcc_interval": [0.4, 0.6], "srcc": 0.3, "srcc_interval": [0.2, 0.4]}}
    text = first_look.table(results, {"taught": 60.0, "b-all": 120.0, "a-all": 30.0}, trees)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert rows["a-all"].endswith("| 12.5% | 0.5 |") and rows["b-all"].endswith("| 3.0 |")
    assert rows["trees-all"].endswith("| 0.500 [0.400, 0.600] | 0.300 [0.200, 0.400] | | | | |")
    assert "0.100 [0.050, 0.150]" in rows["b-all"] and rows["a-tenth"].count("constant") == 2
    assert "| low | 40 | 0.50 | 0.90 | 0.70 | 0.50 | +0.40 [+0.30, +0.50] |" in rows["noise (grade)"]
    path: pathlib.Path = tmp_path / "page.png"
    first_look.draw(tmp_path, results, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
