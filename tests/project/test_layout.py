"""Which files there are: every op's partners by name, docstring-only backends, links, lengths.

Written as tests/project/test_imports.py is, which holds who may import whom: rules over {path: source}, each run on
the repository and on a small tree made to break it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

Tree = dict[str, str]
Rule = Callable[[Tree], list[str]]

ROOT = Path(__file__).resolve().parents[2]
BACKEND_INITS = (
    "kernels/__init__.py",
    "kernels/triton/__init__.py",
    "kernels/cpu/__init__.py",
    "kernels/onednn/__init__.py",
    "reference/__init__.py",
)
LONGEST = 400
MAY_BE_LONGER: set[str] = set()


def op_files(tree: Tree, backend: str) -> dict[str, str]:
    """{path: op} of the files in a backend; one that starts with an underscore is a helper of several."""
    paths = [path for path in map(PurePosixPath, tree) if path.match(f"{backend}/*.py") and path.stem[0] != "_"]
    return {str(path): path.stem for path in paths}


def ops_of(tree: Tree) -> list[str]:
    """The keys of `OPS` of fastmimi/runtime/ops.py, a dict written out there."""
    for statement in ast.parse(tree.get("fastmimi/runtime/ops.py", "")).body:
        match statement:
            case ast.AnnAssign(ast.Name("OPS"), value=ast.Dict(keys)):
                return [key.value for key in keys if isinstance(key, ast.Constant)]
    return []


# ---- the rules


def ops_have_reference_and_test(tree: Tree) -> list[str]:
    ops = ops_of(tree)
    wanted = [path for op in ops for path in (f"reference/{op}.py", f"tests/kernels/test_{op}.py")]
    return [f"{path} is missing" for path in wanted if path not in tree] if ops else ["OPS names no op"]


def files_in_backends_are_ops(tree: Tree) -> list[str]:
    files = op_files(tree, "reference") | op_files(tree, "kernels/*")
    return [f"{path} is no op of fastmimi/runtime/ops.py" for path, op in files.items() if op not in ops_of(tree)]


def functions_have_the_files_name(tree: Tree) -> list[str]:
    """The public function has the file's name."""
    wanted = {path: {op} for path, op in op_files(tree, "reference").items()}
    wanted |= {path: {op} for path, op in op_files(tree, "kernels/*").items()}
    wrong = []
    for path, names in wanted.items():
        body = ast.parse(tree[path]).body
        there = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        there |= {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
        wrong += [f"{path} has no function {name}" for name in sorted(names - there)]
    return wrong


def backend_inits_are_docstrings(tree: Tree) -> list[str]:
    """With the repository on sys.path, others probe for a package named `kernels` and run these files."""
    wrong = []
    for path in BACKEND_INITS:
        match ast.parse(tree.get(path, "")).body:
            case [ast.Expr(ast.Constant(str()))]:
                pass
            case _:
                wrong.append(f"{path} must be there and hold a docstring and nothing else")
    return wrong


def tests_are_no_package(tree: Tree) -> list[str]:
    """pytest runs with --import-mode=importlib; a conftest.py at the root would put the root on sys.path."""
    wrong = [path for path in tree if path.startswith("tests/") and path.endswith("/__init__.py")]
    wrong += ["conftest.py"] if "conftest.py" in tree else []
    return [f"{path} must not be there" for path in wrong]


def files_are_short(tree: Tree) -> list[str]:
    lengths = {path: len(source.splitlines()) for path, source in tree.items() if path not in MAY_BE_LONGER}
    return [f"{path} has {n} lines: two subjects?" for path, n in lengths.items() if n > LONGEST]


# ---- the tests

RULES: list[Rule] = [
    ops_have_reference_and_test,
    files_in_backends_are_ops,
    functions_have_the_files_name,
    backend_inits_are_docstrings,
    tests_are_no_package,
    files_are_short,
]
DOC = '"""What it is."""\n'
SOUND: Tree = {
    "fastmimi/runtime/ops.py": "OPS: dict[str, Op] = {'rvq': Op('search')}",
    "kernels/cpu/_packing.py": "",
    "kernels/cpu/rvq.py": "from ._packing import pack\ndef rvq(): ...",
    "reference/rvq.py": "def rvq(): ...",
    "tests/kernels/test_rvq.py": "",
    "bench/bench_ops.py": "\n" * LONGEST,
    **dict.fromkeys(BACKEND_INITS, DOC),
}
# The rule, the file that breaks it, its source; None takes the file away.
BROKEN: list[tuple[Rule, str, str | None]] = [
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", None),
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", "OPS: dict[str, Op] = {}"),
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", "OPS: dict[str, Op] = {'rvq': Op(), 'norm': Op()}"),
    (ops_have_reference_and_test, "reference/rvq.py", None),
    (ops_have_reference_and_test, "tests/kernels/test_rvq.py", None),
    (files_in_backends_are_ops, "reference/norm.py", "def norm(): ..."),
    (files_in_backends_are_ops, "kernels/triton/norm.py", ""),
    (functions_have_the_files_name, "reference/rvq.py", "def search(): ..."),
    (functions_have_the_files_name, "kernels/cpu/rvq.py", "def search(): ..."),
    (backend_inits_are_docstrings, "kernels/__init__.py", DOC + "import torch"),
    (backend_inits_are_docstrings, "reference/__init__.py", "VERSION = 1"),
    (backend_inits_are_docstrings, "kernels/triton/__init__.py", None),
    (tests_are_no_package, "conftest.py", ""),
    (tests_are_no_package, "tests/__init__.py", ""),
    (tests_are_no_package, "tests/data/__init__.py", ""),
    (files_are_short, "bench/bench_ops.py", "\n" * (LONGEST + 1)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, repository: Tree) -> None:
    assert rule(repository) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_keeps_the_rule(rule: Rule) -> None:
    assert rule(SOUND) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"), BROKEN, ids=[f"{rule.__name__}-{path}" for rule, path, _ in BROKEN]
)
def test_the_rule_sees_what_breaks_it(rule: Rule, path: str, source: str | None) -> None:
    tree = {name: text for name, text in SOUND.items() if name != path}
    assert rule(tree if source is None else {**tree, path: source})


def test_every_rule_is_broken_somewhere() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_ops_are_read_as_python_reads_them(repository: Tree) -> None:
    from fastmimi.runtime.ops import OPS

    assert ops_of(repository) == list(OPS)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_rooms_are_links_to_the_top(backend: str) -> None:
    link = ROOT / "fastmimi" / backend
    assert link.is_symlink()
    assert os.readlink(link) == f"../{backend}"


def test_every_required_dependency_is_imported(repository: Tree) -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    required = set(re.findall(r'"([\w-]+)', listed[1]))
    shipped = [text for path, text in repository.items() if path.startswith(("fastmimi/", "kernels/", "reference/"))]
    imported = {name for text in shipped for name in re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)}
    assert {"einops", "torch"} <= required <= imported
