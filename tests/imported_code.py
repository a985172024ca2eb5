"""Which modules of the package a module runs, by following every import, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_file(module: str) -> Path:
    path = ROOT / "sparsity_forcing" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_modules(start: str) -> set[str]:
    """Modules of the package, by name below it, that ``start`` needs; packages stand for their __init__."""
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(module_file(module).read_text(encoding="utf-8"))):
            waiting += [name for name in imported_names(node) if module_file(name).exists()]
    return seen


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        return []
    return [name.removeprefix("sparsity_forcing.") for name in names if name.startswith("sparsity_forcing.")]
