"""The files of the repository: those that each op needs, packages with docstrings only, symbolic links, lengths.

As in tests/project/test_imports.py, a rule is a function of {path: source}; each runs on the repository and on small
trees that violate it.
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
    """{path: op} of the files in a backend, without helpers, whose names start with an underscore."""
    paths = [path for path in map(PurePosixPath, tree) if path.match(f"{backend}/*.py") and path.stem[0] != "_"]
    return {str(path): path.stem for path in paths}


def ops_of(tree: Tree) -> list[str]:
    """The keys of the dict literal `OPS` in fastmimi/runtime/ops.py."""
    for statement in ast.parse(tree.get("fastmimi/runtime/ops.py", "")).body:
        match statement:
            case ast.AnnAssign(ast.Name("OPS"), value=ast.Dict(keys)):
                return [key.value for key in keys if isinstance(key, ast.Constant)]
    return []


# ---- the rules


def ops_have_reference_and_test(tree: Tree) -> list[str]:
    ops = ops_of(tree)
    expected = [path for op in ops for path in (f"reference/{op}.py", f"tests/kernels/test_{op}.py")]
    return [f"{path} is missing" for path in expected if path not in tree] if ops else ["OPS names no op"]


def files_in_backends_are_ops(tree: Tree) -> list[str]:
    files = op_files(tree, "reference") | op_files(tree, "kernels/*")
    return [f"{path} is no op of fastmimi/runtime/ops.py" for path, op in files.items() if op not in ops_of(tree)]


def files_define_the_function_of_their_name(tree: Tree) -> list[str]:
    """The public function has the name of its file."""
    expected = {path: {op} for path, op in op_files(tree, "reference").items()}
    expected |= {path: {op} for path, op in op_files(tree, "kernels/*").items()}
    wrong = []
    for path, names in expected.items():
        body = ast.parse(tree[path]).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        defined |= {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
        wrong += [f"{path} has no function {name}" for name in sorted(names - defined)]
    return wrong


def backend_inits_are_docstrings(tree: Tree) -> list[str]:
    """With the repository on sys.path, libraries that probe for a package named `kernels` run these files."""
    wrong = []
    for path in BACKEND_INITS:
        match ast.parse(tree.get(path, "")).body:
            case [ast.Expr(ast.Constant(str()))]:
                pass
            case _:
                wrong.append(f"{path} must exist and contain only a docstring")
    return wrong


def tests_are_not_a_package(tree: Tree) -> list[str]:
    """pytest runs with --import-mode=importlib; a conftest.py at the root would put the root on sys.path."""
    wrong = [path for path in tree if path.startswith("tests/") and path.endswith("/__init__.py")]
    wrong += ["conftest.py"] if "conftest.py" in tree else []
    return [f"{path} must not exist" for path in wrong]


def files_are_short(tree: Tree) -> list[str]:
    lengths = {path: len(source.splitlines()) for path, source in tree.items() if path not in MAY_BE_LONGER}
    return [f"{path} has {n} lines, more than {LONGEST}: split it" for path, n in lengths.items() if n > LONGEST]


# ---- the tests

RULES: list[Rule] = [
    ops_have_reference_and_test,
    files_in_backends_are_ops,
    files_define_the_function_of_their_name,
    backend_inits_are_docstrings,
    tests_are_not_a_package,
    files_are_short,
]
DOC = '"""What it is."""\n'
VALID: Tree = {
    "fastmimi/runtime/ops.py": "OPS: dict[str, Op] = {'rvq': Op('search')}",
    "kernels/cpu/_packing.py": "",
    "kernels/cpu/rvq.py": "from ._packing import pack\ndef rvq(): ...",
    "reference/rvq.py": "def rvq(): ...",
    "tests/kernels/test_rvq.py": "",
    "bench/bench_ops.py": "\n" * LONGEST,
    **dict.fromkeys(BACKEND_INITS, DOC),
}
# The rule, the file that violates it, its source; None removes the file.
VIOLATIONS: list[tuple[Rule, str, str | None]] = [
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", None),
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", "OPS: dict[str, Op] = {}"),
    (ops_have_reference_and_test, "fastmimi/runtime/ops.py", "OPS: dict[str, Op] = {'rvq': Op(), 'norm': Op()}"),
    (ops_have_reference_and_test, "reference/rvq.py", None),
    (ops_have_reference_and_test, "tests/kernels/test_rvq.py", None),
    (files_in_backends_are_ops, "reference/norm.py", "def norm(): ..."),
    (files_in_backends_are_ops, "kernels/triton/norm.py", ""),
    (files_define_the_function_of_their_name, "reference/rvq.py", "def search(): ..."),
    (files_define_the_function_of_their_name, "kernels/cpu/rvq.py", "def search(): ..."),
    (backend_inits_are_docstrings, "kernels/__init__.py", DOC + "import torch"),
    (backend_inits_are_docstrings, "reference/__init__.py", "VERSION = 1"),
    (backend_inits_are_docstrings, "kernels/triton/__init__.py", None),
    (tests_are_not_a_package, "conftest.py", ""),
    (tests_are_not_a_package, "tests/__init__.py", ""),
    (tests_are_not_a_package, "tests/data/__init__.py", ""),
    (files_are_short, "bench/bench_ops.py", "\n" * (LONGEST + 1)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_follows_the_rule(rule: Rule, repository: Tree) -> None:
    assert rule(repository) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_valid_tree_follows_the_rule(rule: Rule) -> None:
    assert rule(VALID) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"), VIOLATIONS, ids=[f"{rule.__name__}-{path}" for rule, path, _ in VIOLATIONS]
)
def test_the_rule_finds_a_violation(rule: Rule, path: str, source: str | None) -> None:
    tree = {name: text for name, text in VALID.items() if name != path}
    assert rule(tree if source is None else {**tree, path: source})


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(RULES)


def test_ops_of_the_source_are_those_at_runtime(repository: Tree) -> None:
    from fastmimi.runtime.ops import OPS

    assert ops_of(repository) == list(OPS)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_backend_folders_are_symbolic_links(backend: str) -> None:
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
