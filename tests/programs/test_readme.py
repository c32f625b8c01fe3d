"""Every command the README and the docs show: the files, flags and targets it names exist, and the short ones run."""

import dataclasses
import itertools
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import typing

import pytest
import typer

from calm_jax import cli, recipes
from calm_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("calm_jax.train", "calm_jax.evaluate", "calm_jax.config", "tools.demo", "tools.bench", "tools.prepare_data",
           "tools.convert_from_hf", "tools.export_to_hf", "tools.check_parity", "tools.show_samples",
           "tools.tokenizer", "tools.make_cues", "tools.studies.first_look", "tools.study", "tools.plan",
           "tools.bench.gpu", "tools.bench.pack", "calm_jax.supervise")


def commands() -> list[tuple[str, str]]:
    """(page, command) for each line of the code blocks that starts like a command; comments are cut off."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines() if language in ("", "bash", "sh") else ():
                text = line.split("  #")[0].strip()
                if text.startswith(("make ", "python -m ", "pip install", "bash ", "calm ")):
                    found.append((page.name, text))
    return found


def test_there_are_commands():
    text = "\n".join(command for _, command in commands())
    for needed in ("make demo", "make test", "calm train --config finetune", "calm evaluate",
                   "python -m tools.bench train", "calm score", "calm personalise", "calm convert", "calm export",
                   "calm parity"):
        assert needed in text


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_shown_command_exists(page, command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip":
        extras = re.findall(r"calm_jax\[(.*?)\]|\.\[(.*?)\]", command)
        section = (ROOT / "setup.cfg").read_text()
        for extra in ",".join(a or b for a, b in extras).split(","):
            assert not extra or re.search(rf"^{extra} =", section, re.MULTILINE)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        if "--" in words and words[2] == "calm_jax.supervise":  # another program's command stands behind it
            place = words.index("--")
            test_a_shown_command_exists(page, shlex.join(["python", *words[place + 1:]]))
            words = words[:place]
        options = calm_options(words[1]) if words[0] == "calm" else options_of(page, words[2])
        for word in words[2 if words[0] == "calm" else 3:]:
            if word.startswith("--config."):
                check_field(word)
            elif word.startswith("--"):
                name = word.split("=")[0].replace("_", "-")
                assert name in options, f"{page}: {' '.join(words[:3])} has no option {name}"
        given = [word for before, word in itertools.pairwise(words) if before == "--config"]
        for recipe in given:
            check_recipe(page, recipe)


def calm_options(name: str) -> set[str]:
    """The options of a command of calm."""
    commands = typer.main.get_command(cli.app).commands
    assert name in commands or name.startswith("--"), f"calm has no command {name}"
    if name.startswith("--"):
        return {"--help", "--version", "--install-completion"}
    return {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}


def options_of(page: str, module: str) -> set[str]:
    """The options of a module that is run by `python -m`."""
    assert module in MODULES, f"{page}: add {module} to MODULES here, or correct the page"
    path = ROOT / (module.replace(".", "/") + ".py")
    text = (path if path.exists() else ROOT / module.replace(".", "/") / "__main__.py").read_text()
    if found := re.search(r'^    main\("(.*)"\)', text, re.MULTILINE):
        return calm_options(found[1])
    declared = re.findall(r"^        (\w+): (?:Annotated|cli)", text, re.MULTILINE)
    return {f"--{name.replace('_', '-')}" for name in declared} | set(re.findall(r'"(--[a-z-]+)"', text))


def check_recipe(page: str, given: str) -> None:
    """`NAME` or `FILE`, with a variant that it has."""
    if given in ("FILE", "NAME", "..."):
        return
    name, _, variant = given.partition(":")
    path = ROOT / name if (ROOT / name).is_file() else recipes.FOLDER / f"{name}.py"
    assert path.is_file(), f"{page}: there is no recipe {name}"
    known = runpy.run_path(str(path)).get("VARIANTS", config_lib.VARIANTS)
    assert variant in ("", *known, "VARIANT"), f"{page}: {path} has no variant {variant}"


def check_field(word: str) -> None:
    """`--config.a.b=value` names a field; below `processes` any name stands for a process."""
    names, kind = word[len("--config."):].split("=")[0].split("."), config_lib.Config
    while names:
        if kind in config_lib.FAMILIES:
            kind = config_lib.FAMILIES[kind].get({"Encoder": "clip", "Decoder": "llama"}[kind.__name__])
        hints = typing.get_type_hints(kind)
        assert names[0] in hints, f"{word}: {names[0]} is not a field"
        kind = hints[names.pop(0)]
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            names.pop(0)
        if not dataclasses.is_dataclass(kind):
            assert not names, f"{word}: {names} lies below a single value"


def test_the_table_of_fields_prints():
    text = subprocess.run([sys.executable, "-m", "calm_jax.config"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    assert "config.model.encoder.image_size = 336" in text and "paper" in text and "ours" in text
