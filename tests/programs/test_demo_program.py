"""tools.demo: from nothing to a page, and from a page to the same page without doing it all again."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from calm_jax.commands import demo
from calm_jax.commands import steps as commands

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "tools.demo", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=1500, **options)


@pytest.mark.slow
def test_the_quick_demo_ends_with_a_page_and_goes_on_where_it_stopped(tmp_path):
    begin = time.monotonic()
    done = _run("--quick", "--workdir", str(tmp_path / "demo"))
    first = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-2000:]
    page = pathlib.Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert page == tmp_path / "demo" / "report.html" and page.is_file()
    text = page.read_text(encoding="utf-8")
    assert demo.TITLE not in text and demo.QUICK_TITLE in text
    for name in ("self_supervised", "generic", "comments", "scores", "--control", "--quick"):
        assert name in text
    assert "[1/8] training" in done.stdout and "peak memory" in done.stdout
    seconds = json.loads((tmp_path / "demo" / "seconds.json").read_text())

    begin = time.monotonic()
    again = _run("--quick", "--workdir", str(tmp_path / "demo"))
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("up to date") == 3 and again.stdout.count("complete (3 steps)") == 10
    assert json.loads((tmp_path / "demo" / "seconds.json").read_text()) == seconds
    assert time.monotonic() - begin < first

    # A step that fails stops the rest with its code and one sentence.
    (tmp_path / "demo" / "pretrain" / "config.json").write_text("{")
    broken = _run("--quick", "--workdir", str(tmp_path / "demo"))
    assert broken.returncode == 2
    assert "config.json is damaged" in broken.stderr and "step 1" in broken.stderr.splitlines()[-1]
    assert "[2/8]" not in broken.stdout


def lines(extent: demo.Extent) -> list[str]:
    return [commands.command_line(step) for step in demo.steps(pathlib.Path("runs/demo"), extent)]


def test_commands_are_what_is_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    short, full = lines("short"), lines("full")
    assert all(not line.startswith(os.sep) for line in short + full) and (len(short), len(full)) == (7, 9)
    assert short[0].endswith("-m calm_jax parts laptop --out runs/demo/parts")
    assert short[1].endswith("-m calm_jax convert --parts runs/demo/parts --out runs/demo/start")
    assert "--config pretrain:laptop --workdir runs/demo/pretrain --config.init=runs/demo/start" in short[2]
    assert "--config.init=runs/demo/pretrain --config.tokenizer=runs/demo/start" in short[3]
    assert not any("shuffle" in line or "--control" in line for line in short)


def test_the_control_learns_from_shuffled_labels_alone(monkeypatch):
    """All its processes, and otherwise as the model beside it."""
    monkeypatch.chdir(ROOT)
    for extent, (mine, control) in (("full", (2, 4)), ("quick", (0, 2))):
        typed = lines(extent)
        for stage, names in enumerate((("self_supervised", "generic"), ("comments", "scores"))):
            words = typed[control + stage].split()
            shuffled = [word for word in words if "shuffle_labels=True" in word]
            assert all(any(f".{name}.shuffle" in word for word in shuffled) for name in names)
            rest = " ".join(word for word in words if word not in shuffled)
            assert rest.replace("control-", "") == typed[mine + stage]
        assert "--control runs/demo/control-finetune" in next(line for line in typed if "--task attributes" in line)


def test_without_the_packages_of_the_parts_it_says_so_and_stops(tmp_path):
    nowhere = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "UV_FIND_LINKS": str(tmp_path)}
    done = _run("--workdir", str(tmp_path / "demo"), env=nowhere)
    assert done.returncode == 2 and "could not be fetched" in done.stderr and "Traceback" not in done.stderr
    assert "step 1" in done.stderr.splitlines()[-1] and "[2/" not in done.stdout
    assert not (tmp_path / "demo" / "parts").exists() and not (tmp_path / "demo" / "pretrain").exists()


def test_two_demos_at_once_are_refused(tmp_path):
    done = _run("--quick", "--full", "--workdir", str(tmp_path / "demo"))
    assert done.returncode == 2 and "name one" in done.stderr and not (tmp_path / "demo").exists()


@pytest.mark.parametrize("later", ("result", "checkpoint"))
def test_an_evaluation_is_current_when_it_is_newer_than_its_checkpoints(tmp_path, later):
    result, marker = tmp_path / "result.json", tmp_path / "model" / "00000001" / "COMPLETE.json"
    marker.parent.mkdir(parents=True)
    for number, path in enumerate((marker, result) if later == "result" else (result, marker)):
        path.write_text("{}")
        os.utime(path, (1000 + number, 1000 + number))
    assert commands.Step("", (), result, (tmp_path / "model",)).current == (later == "result")
    assert not commands.Step("", (), result).current, "a training decides by itself"
    result.write_text('{"records": 24}')
    os.utime(result, (2000, 2000))
    assert [commands.Step("", (), result, (tmp_path / "model",), asked=(("records", number),)).current
            for number in (24, 36)] == [True, False]
    assert commands.Step("", (), result, once=True).current
    assert not commands.Step("", (), tmp_path / "not yet", once=True).current
