"""`calm --help` and the help of every command: a line each, arguments, defaults, an example, 100 columns at most."""

from __future__ import annotations

import re
import subprocess
import sys

import miniature
import pytest
import typer

from calm_jax import cli

COMMANDS = [info.name for info in cli.app.registered_commands]
ENTRIES = {"calm_jax.train": "train", "calm_jax.evaluate": "evaluate", "tools.convert_from_hf": "convert",
           "tools.export_to_hf": "export", "tools.check_parity": "parity", "tools.prepare_data": "prepare",
           "tools.plan": "plan", "tools.demo": "demo", "tools.show_samples": "samples", "tools.make_cues": "cues"}


def program(*words: str, module: str = "calm_jax") -> subprocess.CompletedProcess:
    return miniature.run([sys.executable, "-m", module, *words],
                         miniature.environment() | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


def test_all_commands_stand_in_groups_with_a_line_each():
    done = program("--help")
    assert done.returncode == 0 and all(len(line) <= 100 for line in done.stdout.splitlines()), done.stderr
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\s+\w", done.stdout, re.MULTILINE), name
    panels = {info.rich_help_panel for info in cli.app.registered_commands}
    assert len(panels) == 4 and all(panel in done.stdout for panel in panels)
    assert "Exit codes" in done.stdout and "--install-completion" in done.stdout
    assert program().stdout.startswith(done.stdout[:40])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_its_options_defaults_and_an_example_that_it_takes(name):
    done = program(name, "--help")
    assert done.returncode == 0 and all(len(line) <= 100 for line in done.stdout.splitlines()), done.stderr
    command = typer.main.get_command(cli.app).commands[name]
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help and parameter.opts[0] in done.stdout, parameter.name
    examples = re.findall(r"^\s*(calm .*)$", done.stdout.replace("\n  ", "\n"), re.MULTILINE)
    assert any(line.startswith(f"calm {name} ") for line in examples), done.stdout


def test_help_loads_nothing_that_takes_long():
    code = ("import sys, contextlib, io; from calm_jax import cli\n"
            "with contextlib.redirect_stdout(io.StringIO()): cli.invoke(['train', '--help'])\n"
            "print(sorted({'jax', 'numpy', 'absl', 'flax', 'orbax', 'ml_collections', 'transformers', 'PIL'} "
            "& set(sys.modules)))")
    done = miniature.run([sys.executable, "-c", code], miniature.environment())
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_version():
    import calm_jax
    assert program("--version").stdout == f"calm_jax {calm_jax.__version__}\n"


@pytest.mark.parametrize(("words", "said"), [
    (("scroe", "a.jpg"), "'score'"), (("score", "--chekpoint", "x", "a.jpg"), "--checkpoint"),
    (("score", "a.jpg", "--checkpoint", "x", "--reader", "texte"), "'text'"), (("score", "a.jpg"), "--checkpoint"),
    (("score", "a.jpg", "--checkpoint", "x", "--batch", "0"), "--batch"),
    (("train", "--config", "finetune", "--confg.seed=1"), "--confg.seed"), (("train",), "--config"),
    (("train", "--config", "finetuen"), "finetune"), (("train", "--config", "finetune", "word"), "'word'"),
    (("train", "--config", "finetune", "--config.sede=1"), "'seed'"),
    (("train", "--config", "finetune", "--config.seed=one"), "seed"),
    (("evaluate", "--workdir", "x", "--task", "scorin"), "'scoring'"), (("nothing",), "nothing")])
def test_wrong_use_is_one_sentence_with_the_nearest_name_and_exit_code_2(words, said):
    done = program(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and not done.stdout


@pytest.mark.parametrize("module", ENTRIES)
def test_entries_under_their_old_names_are_the_same_program(module):
    done = program("--help", module=module)
    assert done.returncode == 0 and f"calm {ENTRIES[module]} " in done.stdout, done.stderr


def test_underscores_and_dashes_are_the_same():
    both = [program("prepare", "--dataset", "nothing", "--source", ".", option, "data").stderr
            for option in ("--data_dir", "--data-dir")]
    assert both[0] == both[1] and "'nothing'" in both[0]
