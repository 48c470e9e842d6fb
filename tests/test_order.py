"""The import order of the package, and a door that opens without waiting for torch."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import deepatlas

SOURCE = Path(deepatlas.__file__).parent

# A module may import only what stands before it.
ORDER = [
    *("errors", "shapes", "config", "machine"),
    *("kernels_cpu", "kernels_gpu", "grid", "affine", "warp", "losses", "augment", "metrics"),
    *("volume", "phantom", "files", "markups", "prepare", "transforms", "common_grid", "store", "masks"),
    *("networks", "autoencoder", "tissue", "atlas", "checkpoint"),
    *("loop", "objective", "fitting", "views", "pretrain", "finetune"),
    *(
        "embedding",
        "found",
        "refine",
        "dense",
        "places",
        "classifier",
        "segmentation",
        "locate",
        "pairs",
        "regions",
        "register",
        "atlas_grid",
        "regseg",
        "regseg_scores",
        "orientation",
        "consistency",
        "vote",
        "outputs",
        "cascade",
        "library",
        "evaluate",
        "report",
        "demo",
    ),
    *("cli", "__main__"),
]
EXAMS = {"volume", "phantom", "files", "markups", "prepare", "transforms", "common_grid", "store", "masks"}
MODELS = {"networks", "autoencoder", "tissue", "atlas", "checkpoint"}
DOOR = {"cli", "__main__", "__init__"}  # loads the rooms when they are asked for, so it answers for itself


def modules():
    """Names of the package's modules; a folder is a module too."""
    return sorted(
        path.stem
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    )


def source_of(name):
    """Text of every file of a module."""
    single = SOURCE / f"{name}.py"
    files = [single] if single.exists() else sorted((SOURCE / name).rglob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def imports(text):
    """Modules of the package that a source imports, anywhere in it: at the top, in a function, under an `if`."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.add("a relative import")
            elif node.module == "deepatlas":
                found |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif node.module.startswith("deepatlas."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("deepatlas."):
                    found.add(alias.name.split(".")[1])
                elif alias.name == "deepatlas":
                    found.add("__init__")
    return found


def broken(name, found):
    """What is wrong with a module's imports, in words; empty where nothing is."""
    faults = []
    for other in sorted(found - {name}):
        if other not in ORDER:
            faults.append(f"{name} imports {other}, which is no module of the list")
        elif ORDER.index(other) >= ORDER.index(name):
            faults.append(f"{name} imports {other}, which stands below it")
        elif (name in EXAMS and other in MODELS) or (name in MODELS and other in EXAMS):
            faults.append(f"{name} imports {other}: exams and models do not know each other")
    return faults


def test_every_module_has_its_place():
    assert [name for name in modules() if name not in [*ORDER, "__init__"]] == []
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", [name for name in modules() if name not in DOOR])
def test_a_module_imports_only_what_stands_above_it(name):
    if name not in ORDER:
        pytest.fail(f"{name} is not in ORDER; give it a place")
    assert [fault for text in source_of(name) for fault in broken(name, imports(text))] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics", "from deepatlas.volume import Volume"),
        ("metrics", "def f():\n    from deepatlas import files"),
        ("pretrain", "import deepatlas.locate"),
        ("checkpoint", "from deepatlas import volume"),
        ("atlas", "from deepatlas.store import Cohort"),
        ("locate", "import deepatlas"),
        ("locate", "from .files import exam_name"),
        ("locate", "from deepatlas import nowhere"),
        ("evaluate", "if True:\n    from deepatlas.cli import app"),
    ],
)
def test_the_order_test_sees_a_breach(name, text):
    assert broken(name, imports(text))


def test_the_order_test_lets_good_imports_pass():
    text = "import torch\nfrom deepatlas import files, metrics\nfrom deepatlas.errors import LabelError\n"
    assert broken("evaluate", imports(text)) == []


def run(code):
    """Run a line of Python in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_importing_the_package_does_not_wait_for_torch():
    done = run("import sys, deepatlas; assert 'torch' not in sys.modules, 'torch was imported'")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("deepatlas.__main__") is None or find_spec("deepatlas.cli") is None, reason="no door yet")
def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from deepatlas.__main__ import main\n"
        "sys.argv = ['deepatlas', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
