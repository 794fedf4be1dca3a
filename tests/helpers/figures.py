"""Figures of the code's structure: `python tests/helpers/figures.py`. tests/test_boundaries.py bounds some of them."""

from __future__ import annotations

import ast
import functools
import statistics
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("preprocess", "shards", "train")

# The order of the folders and root files of each package, top to bottom: each imports only from those below it.
# The list in `docs/architecture.md` is made of it.
ORDER = {
    "preprocess": """
        cli pipeline tools forecast build project plan demo video text fetch encoders corpus config facts rejection
    """,
    "shards": """
        cli report show stats check write read files format storage page config console machine gpus errors
    """,
    "train": """
        cli loop doctor report step run evaluate recompute estimate lora sampling model data parallel launch
        checkpoint optim precision objective config geometry device
    """,
}


class Figures(NamedTuple):
    """What a reader meets."""

    files: int
    lines: int
    blank_lines: int
    docstring_lines: int
    comment_lines: int
    largest_folder: int
    """Python files of the folder that has most."""
    largest_root: int
    """Files and folders at the root of the package that has most, without `__init__.py`."""
    depth: int
    """Files on the longest chain of imports."""
    imports_per_file: float
    """Imports of files of this project."""
    function_median_lines: float
    function_p90_lines: float


def sources() -> list[Path]:
    """Every Python file of the three packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def has_python(folder: Path) -> bool:
    """Whether a folder is a package of Python files."""
    return (folder / "__init__.py").exists()


def module_name(path: Path) -> str:
    """`train/lora/merge.py` is `train.lora.merge`; a package's `__init__.py` is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def import_graph() -> dict[str, frozenset[str]]:
    """For every module the modules of this project that it imports, in function bodies too, for types only not."""
    names = {module_name(path): path for path in sources()}
    graph = {}
    for name, path in names.items():
        found = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                # `from package import module` names the module, `from module import name` does not.
                found |= {
                    full if (full := f"{node.module}.{alias.name}") in names else node.module for alias in node.names
                }
        graph[name] = frozenset(found & set(names) - {name})
    return graph


def cycles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Strongly connected components, those that are imported first (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            groups.append(stack[at:])
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def depth(graph: dict[str, frozenset[str]]) -> int:
    """Files on the longest chain of imports; a cycle counts once."""
    level: dict[str, int] = {}
    for group in cycles(graph):
        below = [level[other] for name in group for other in graph[name] if other not in group]
        level |= dict.fromkeys(group, 1 + max(below, default=0))
    return max(level.values())


def figures() -> Figures:
    """All of them, of the working tree."""
    graph, texts = import_graph(), [path.read_text(encoding="utf-8") for path in sources()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    lengths, docstrings = [], 0
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lengths.append(node.end_lineno - node.lineno + 1)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.end_lineno:
                docstrings += node.end_lineno - node.lineno + 1
    folders = {path.parent for path in sources()}
    roots = [
        sum((path.suffix == ".py" and path.stem != "__init__") or has_python(path) for path in (ROOT / name).iterdir())
        for name in PACKAGES
    ]
    return Figures(
        files=len(texts),
        lines=len(lines),
        blank_lines=lines.count(""),
        docstring_lines=docstrings,
        comment_lines=sum(line.startswith("#") for line in lines),
        largest_folder=max(sum(path.stem != "__init__" for path in folder.glob("*.py")) for folder in folders),
        largest_root=max(roots),
        depth=depth(graph),
        imports_per_file=round(sum(map(len, graph.values())) / len(graph), 2),
        function_median_lines=statistics.median(lengths),
        function_p90_lines=statistics.quantiles(lengths, n=10)[-1],
    )


if __name__ == "__main__":
    for name, value in figures()._asdict().items():
        print(f"{name:24} {value:,}")
