"""The import direction of the package holds, and training needs no torch, transformers or TensorFlow."""

from __future__ import annotations

import ast
import subprocess
import sys

import miniature
import pytest

PACKAGE = miniature.ROOT / "calm_jax"
PROGRAMS = {"api", "cli", "commands", "guard", "host_memory", "recipes", "terminal", "train", "evaluate", "supervise",
            "__main__"}
BASE = {"errors", "registry", "config", "files", "json_files"}  # what everything else may stand on
# part -> the parts of the package that it may import; a part with a dot is a single module. The order is the direction.
MAY: dict[str, set[str]] = {
    "jaxlib_guard": set(),
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "json_files": {"errors"},
    "files": {"errors", "config"},
    "path_rules": {"errors"},
    "sharding": {"errors", "config", "path_rules"},
    "models": {*BASE, "sharding", "models"},
    "text": {*BASE, "data.samples", "text"},
    "checkpoints": {*BASE, "sharding", "models", "text", "checkpoints"},
    "data": {*BASE, "text", "data"},
    "features": {*BASE, "models", "data", "features"},
    "training": {*BASE, "path_rules", "sharding", "models", "text", "checkpoints", "data", "features", "training"},
    "inference": {*BASE, "models", "text", "checkpoints", "data", "features", "inference"},
    "convert": {*BASE, "models", "text", "checkpoints", "data", "inference", "convert"},
    "evaluation": {*BASE, "inference", "text", "data", "evaluation"},
}
FOREIGN = {"torch", "transformers", "tensorflow", "tensorflow_datasets", "gguf", "onnx"}
TRAVELLING = sorted((PACKAGE / "convert" / "huggingface").glob("[!_]*.py"))  # run elsewhere, as files, not modules
SHIPPED = [path for path in TRAVELLING if path.stem.endswith("_calm")]  # those that exported models carry
FILES = sorted(set(path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts) - set(TRAVELLING))


def module(path) -> str:
    return ".".join(path.relative_to(miniature.ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module(path) for path in FILES}


def imported(tree: ast.AST, at_module_level: bool) -> set[str]:
    """Names of all modules that are imported, `from a import b` as a.b where that is a module of ours."""
    found: set[str] = set()

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if at_module_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    found.add(full if full in NAMES else child.module)
            walk(child)

    walk(tree)
    return found


def part(name: str) -> str:
    pieces = name.split(".")[1:]
    return pieces[0] if pieces else ""


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_module_imports_only_what_stands_below_it(path):
    name = module(path)
    every = imported(ast.parse(path.read_text()), at_module_level=False)
    roots = {other.split(".")[0] for other in every}
    assert not roots & {"tools", "configs", "launch", "tests"}
    own = part(name)
    if own in MAY:
        for other in every:
            below = ".".join(other.split(".")[1:])
            if other.split(".")[0] == "calm_jax" and below:
                assert part(other) in MAY[own] or below in MAY[own], f"{name} imports {other}"
    elif own:
        assert own in PROGRAMS, f"{name} is in no part that design and this test know"


def test_the_directions_that_matter_most_are_really_checked():
    assert {part(name) for name in NAMES} - PROGRAMS - {""} <= MAY.keys()
    assert "data" not in MAY["models"] and all("training" not in MAY[part] for part in MAY if part != "training")
    order = list(MAY)
    for part_of, may in MAY.items():  # the table itself goes one way, but for the one currency of data and text
        assert all(order.index(other.split(".")[0]) <= order.index(part_of) for other in may - {"data.samples"})
    edges = {(part(module(path)), part(other)) for path in FILES
             for other in imported(ast.parse(path.read_text()), False) if other.startswith("calm_jax.")}
    assert {("training", "models"), ("inference", "data"), ("models", "config")} <= edges  # the parser sees them


@pytest.mark.parametrize("path", FILES, ids=module)
def test_foreign_frameworks_are_imported_inside_functions_and_by_convert_only(path):
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imported(tree, at_module_level=True)} & FOREIGN
    inside = {name.split(".")[0] for name in imported(tree, at_module_level=False)}
    assert part(module(path)) in ("convert", "data", "commands", "text") or not inside & FOREIGN
    assert not inside & {"tensorflow"}
    if part(module(path)) == "data":
        assert not inside & {"torch", "transformers"}


@pytest.mark.parametrize("path", [*SHIPPED, PACKAGE / "data" / "pictures.py"], ids=lambda path: path.stem)
def test_files_of_exported_models_run_alone(path):
    """They need what transformers users have, and each other by relative imports."""
    assert len(SHIPPED) == 3
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in ("configuration_calm", "processing_calm", "pictures")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in names}
            assert roots <= set(sys.stdlib_module_names) | {  # transformers itself needs the library `tokenizers`
                "numpy", "torch", "transformers", "tokenizers", "sentencepiece", "PIL"}


def test_nothing_is_a_grab_bag_and_every_module_says_what_goes_in_and_out():
    for path in (*FILES, *SHIPPED):
        assert not set(path.relative_to(PACKAGE).with_suffix("").parts) & {"utils", "util", "common", "helpers", "misc"}
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_training_loads_no_foreign_framework():
    """Not by a dependency either: tensorboardX imports torch wherever it finds it."""
    code = ("import sys, tempfile; import calm_jax.commands.train; from calm_jax.training import logging; "
            "log = logging.Log(tempfile.mkdtemp(), 'p', start=0, steps=1, title='t'); "
            "log.write(1, 'train', {'loss': 1.0}); log.close(); "
            f"print(sorted({FOREIGN!r} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env=miniature.environment(), text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_and_its_interface_start_without_what_they_may_never_need():
    """Each of these takes from a tenth of a second to several seconds to import."""
    late = {*FOREIGN, "openai", "matplotlib", "sklearn", "skimage", "scipy.stats", "pandas", "pyarrow", "jinja2"}
    code = ("import sys; import calm_jax; assert 'jax' not in sys.modules; import calm_jax.api; "
            f"print(sorted({late!r} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env=miniature.environment(), text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == "[]"
