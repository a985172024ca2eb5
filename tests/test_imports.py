"""The library and the kernels import where the pipeline's tools are not installed, and hide nobody else's package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = {"prefect", "mlflow", "dvc", "lmms_eval"}
# What is about one of these tools may need it at import; everything else may not.
ABOUT_A_TOOL = (
    "sparsity_forcing.stages",
    "sparsity_forcing.evaluation.lmms_model",
    "sparsity_forcing.evaluation.task_",
)

IMPORT_ALL = """
import importlib, pkgutil
from importlib.machinery import PathFinder

find = PathFinder.find_spec
absent = lambda name, *rest: None if name.partition(".")[0] in {tools!r} else find(name, *rest)
PathFinder.find_spec = staticmethod(absent)
names = []
for package in ("sparsity_forcing", "sparsity_kernels"):
    module = importlib.import_module(package)
    names.append(package)
    names += [found.name for found in pkgutil.walk_packages(module.__path__, package + ".", onerror=lambda name: None)]
for name in names:
    if not name.startswith({exempt!r}) and not name.endswith("__main__"):
        importlib.import_module(name)
        print(name)
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_the_tools_own_modules_imports_without_the_tools():
    imported = run_python(IMPORT_ALL.format(tools=TOOLS, exempt=ABOUT_A_TOOL)).split()
    wanted = {
        "sparsity_kernels",
        *(f"sparsity_forcing.{name}" for name in ("attention", "selection", "rl", "tracking")),
    }
    assert wanted <= set(imported)


def test_the_tools_are_really_out_of_reach_in_that_test():
    blocked = IMPORT_ALL.format(tools=TOOLS, exempt=ABOUT_A_TOOL).partition("names = []")[0]
    for tool in TOOLS:
        attempt = f"{blocked}\ntry:\n    import {tool}\nexcept ModuleNotFoundError:\n    print('absent')"
        assert run_python(attempt).strip() == "absent"


def test_importing_the_package_loads_neither_torch_nor_a_tool():
    loaded = run_python("import sys, sparsity_forcing; print(*(n for n in sys.modules if '.' not in n))").split()
    assert not (TOOLS | {"torch", "transformers"}) & set(loaded)


def test_the_folder_kernels_does_not_shadow_the_distribution_of_that_name(tmp_path):
    """Hugging Face's `kernels` wins over our folder, even with the repository's root first on the path."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("WHOSE = 'Hugging Face'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHOSE)"
    assert run_python(code).strip() == "Hugging Face"
    where = run_python("import sparsity_kernels; print(sparsity_kernels.__file__)").strip()
    assert Path(where) == ROOT / "kernels" / "sparsity_kernels" / "__init__.py"
