"""Who may import whom.

A rule is a function from a `Tree`, {path: source}, to messages, one for each violation. Each rule runs on the
repository, and on small trees that violate it (`VIOLATIONS`), which tests the rule itself.

All imports are checked, also those inside functions, except those under `if TYPE_CHECKING:`, which never run.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

Tree = dict[str, str]
Rule = Callable[[Tree], list[str]]

BACKENDS = ("fastmimi.reference", "fastmimi.kernels")
BACKEND_MAY_USE = {
    "reference": {"torch", "einops"},
    "kernels.triton": {"torch", "triton"},
    "kernels.cpu": {"torch"},
    "kernels.onednn": {"torch"},
}
# Modules that kernels may import as well; these import only each other.
FOR_KERNELS = {
    "runtime.arrivals",
    "runtime.layout",
    "runtime.lengths",
    "runtime.packing",
    "runtime.quantized",
    "kernels._common",
}
# Each floor imports itself and those before it.
FLOORS = (
    "errors",
    "runtime",
    "models",
    "io",
    "checkpoints",
    "devtools",
    "export",
    "compat",
    "serve",
    "corpus",
    "train",
    "cli",
    "__main__",
)
DISPATCH, ROOT = "runtime.dispatch", ""  # ROOT: fastmimi/__init__
UPWARDS = {  # the exceptions, inside functions only
    ("models.jodio", "checkpoints.weights"),  # JodioModel.from_pretrained and save_pretrained
}
MAY_IMPORT_VERSION = {"train.loop", "serve.load"}  # fastmimi.__version__, for the record of a run
PEERS = ("transformers", "moshi", "rustymimi", "pocket_tts")
MAY_IMPORT_PEERS = {"compat", "train"}
COMPUTED = "<computed>"


class Import(NamedTuple):
    where: str  # "fastmimi/models/mimi.py:14"
    module: str  # that imports, without "fastmimi."
    name: str  # "fastmimi.runtime.ops.OPS", relative imports resolved
    lazy: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.where} imports {self.name}"

    @property
    def floor(self) -> str:
        return floor_of(f"fastmimi.{self.module}")

    @property
    def backend(self) -> str | None:
        """'reference', 'kernels.triton', ... if the importing module is in one."""
        return next((name for name in BACKEND_MAY_USE if inside(self.module, name)), None)


# ---- reading imports


def module_of(path: str) -> str:
    """'kernels/cpu/x.py' -> 'fastmimi.kernels.cpu.x'; 'fastmimi/__init__.py' -> 'fastmimi'."""
    names = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(["fastmimi", *names] if names[0] in ("kernels", "reference") else names)


def floor_of(name: str) -> str:
    """'runtime', 'models', ... of a dotted name; '' for fastmimi itself."""
    return ".".join(name.split(".")[1:2])


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def imports_of(path: str, source: str) -> list[Import]:
    module = module_of(path)
    package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
    found = _walk(ast.parse(source, path), package, lazy=False)
    return [
        Import(f"{path}:{line}", module.removeprefix("fastmimi").lstrip("."), name, lazy) for line, name, lazy in found
    ]


def _walk(node: ast.AST, package: str, *, lazy: bool) -> Iterator[tuple[int, str, bool]]:
    match node:
        case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            for child in node.orelse:
                yield from _walk(child, package, lazy=lazy)
            return
        case ast.Import():
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        case ast.ImportFrom():
            base = _resolve("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", lazy
        case ast.Call(ast.Name(id=call) | ast.Attribute(attr=call), [name, *_]):
            if call in ("import_module", "__import__"):
                yield node.lineno, _literal(name, package), lazy
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            lazy = True
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, lazy=lazy)


def _resolve(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*above, *filter(None, name[level:].split("."))])


def _literal(node: ast.AST, package: str) -> str:
    """The module passed to `import_module`, or its literal prefix; COMPUTED if that leaves open which package it is."""
    match node:
        case ast.Constant(str(name)):
            return _resolve(name, package)
        case ast.JoinedStr([ast.Constant(str(start)), *_]) if _resolve(start, package) != "fastmimi":
            return _resolve(start, package)
    return COMPUTED


def in_package(tree: Tree) -> list[Import]:
    sources = [(path, source) for path, source in tree.items() if inside(module_of(path), "fastmimi")]
    return [found for path, source in sources for found in imports_of(path, source)]


# ---- the rules


def backends_are_closed(tree: Tree) -> list[str]:
    """A backend imports torch, its own language, itself and what is FOR_KERNELS; never another one."""
    wrong = []
    for found in in_package(tree):
        if found.backend is None or inside(found.name, f"fastmimi.{found.backend}"):
            continue
        if found.backend != "reference" and inside(found.name, *(f"fastmimi.{leaf}" for leaf in FOR_KERNELS)):
            continue
        allowed = BACKEND_MAY_USE[found.backend]
        if found.name.split(".")[0] not in allowed | sys.stdlib_module_names:
            wrong.append(f"{found}: {found.backend} may use {', '.join(sorted(allowed))} and itself")
    return wrong


def only_dispatch_imports_backends(tree: Tree) -> list[str]:
    """Only dispatch imports reference or kernels, and only inside functions."""
    wrong = []
    for found in in_package(tree):
        enters = inside(found.name, *BACKENDS) and found.backend is None
        if enters and found.module != DISPATCH:
            wrong.append(f"{found}: only dispatch chooses implementations")
        if (enters or found.name == COMPUTED) and found.module == DISPATCH and not found.lazy:
            wrong.append(f"{found}: dispatch imports a backend when it is requested")
    return wrong


def module_names_are_literals(tree: Tree) -> list[str]:
    """These rules cannot check a computed module name: only dispatch and fastmimi/__init__ may use one."""
    computed = [found for found in in_package(tree) if found.name == COMPUTED]
    return [f"{found}: name the module" for found in computed if found.module not in (DISPATCH, ROOT)]


def floors_import_downwards(tree: Tree) -> list[str]:
    wrong = []
    for found in in_package(tree):
        if not inside(found.name, "fastmimi") or found.backend is not None or inside(found.name, *BACKENDS):
            continue
        if found.module in (ROOT, "kernels._common"):  # the first re-exports all names; the other has a rule of its own
            continue
        if found.floor not in FLOORS:
            wrong.append(f"{found.where} is on no floor; there are {', '.join(FLOORS)}")
            continue
        exempt = found.lazy and any(
            found.module == module and inside(found.name, f"fastmimi.{above}") for module, above in UPWARDS
        )
        version = found.name == "fastmimi.__version__" and found.module in MAY_IMPORT_VERSION
        public = found.name == "fastmimi" and found.floor in ("cli", "__main__")
        below = floor_of(found.name) in FLOORS[: FLOORS.index(found.floor) + 1]
        if not (below or exempt or version or public):
            wrong.append(f"{found}: {found.floor} is below it")
    return wrong


def modules_for_kernels_import_only_each_other(tree: Tree) -> list[str]:
    shared = tuple(f"fastmimi.{leaf}" for leaf in FOR_KERNELS)
    wrong = [
        found
        for found in in_package(tree)
        if found.module in FOR_KERNELS and inside(found.name, "fastmimi") and not inside(found.name, *shared)
    ]
    return [f"{found}: {found.module} is for kernels, and must import nothing else of fastmimi" for found in wrong]


def only_validation_imports_pydantic(tree: Tree) -> list[str]:
    """Configurations are plain dataclasses, and errors are InputError: no other module depends on pydantic."""
    wrong = [found for found in in_package(tree) if inside(found.name, "pydantic")]
    wrong = [found for found in wrong if found.module != "models.validation"]
    return [f"{found}: ask fastmimi.models.validation" for found in wrong]


def the_package_is_lazy(tree: Tree) -> list[str]:
    """`import fastmimi` loads no other module; a peer is loaded by its drop-in, transformers also inside functions."""
    wrong = []
    for found in in_package(tree):
        if found.module == ROOT and not found.lazy and inside(found.name, "fastmimi"):
            wrong.append(f"{found}: fastmimi/__init__ loads a module when one of its names is first used")
        if inside(found.name, *PEERS) and found.floor not in MAY_IMPORT_PEERS:
            if not found.lazy:
                wrong.append(f"{found}: at module level only {' and '.join(sorted(MAY_IMPORT_PEERS))} import a peer")
            elif not inside(found.name, "transformers"):
                wrong.append(f"{found}: an optional peer is for {' and '.join(sorted(MAY_IMPORT_PEERS))}")
    return wrong


def top_level_packages_are_not_imported(tree: Tree) -> list[str]:
    """`import kernels` means the PyPI package of that name; ours is fastmimi.kernels. Also checked in tests."""
    everywhere = [found for path, source in tree.items() for found in imports_of(path, source)]
    wrong = [found for found in everywhere if inside(found.name, "kernels", "reference")]
    return [f"{found}: import fastmimi.{found.name}" for found in wrong]


# ---- the tests

RULES: list[Rule] = [
    backends_are_closed,
    only_dispatch_imports_backends,
    module_names_are_literals,
    floors_import_downwards,
    modules_for_kernels_import_only_each_other,
    only_validation_imports_pydantic,
    the_package_is_lazy,
    top_level_packages_are_not_imported,
]
LAZY = "def f():\n    "
VALID: Tree = {
    "fastmimi/__init__.py": LAZY + "from fastmimi.compat import transformers",
    "fastmimi/__main__.py": "from .cli import main",
    "fastmimi/runtime/ops.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..models.config import JodioConfig",
    "fastmimi/runtime/dispatch.py": "from .ops import OPS\n" + LAZY + "importlib.import_module(backend)",
    "fastmimi/models/mimi.py": "from ..runtime import dispatch, layout\n" + LAZY + "import transformers",
    "fastmimi/models/jodio.py": LAZY + "from ..checkpoints.weights import load",
    "fastmimi/checkpoints/weights.py": "from ..models.mimi import Mimi",
    "fastmimi/compat/moshi.py": "import moshi\nfrom ..models.mimi import Mimi",
    "fastmimi/train/loop.py": "from .. import __version__\nimport transformers",
    "fastmimi/cli/commands.py": "from ..compat import moshi\nfrom ..models import mimi\nimport fastmimi",
    "kernels/cpu/rvq.py": "import torch\nfrom ...runtime import packing, quantized\nfrom ._packing import pack",
    "kernels/triton/rvq.py": "import torch\nimport triton.language as tl",
    "reference/rvq.py": "import math\nimport torch\nfrom . import norm\nfrom fastmimi.reference import norm",
    "tests/kernels/test_rvq.py": "import moshi\nfrom fastmimi.reference.rvq import rvq",
}
VIOLATIONS: list[tuple[Rule, str, str]] = [
    (backends_are_closed, "reference/rvq.py", "import triton"),
    (backends_are_closed, "reference/rvq.py", LAZY + "import numpy"),
    (backends_are_closed, "reference/rvq.py", "from ..runtime.ops import OPS"),
    (backends_are_closed, "reference/rvq.py", "from ..runtime import layout"),
    (backends_are_closed, "reference/rvq.py", "from fastmimi.kernels.cpu import rvq"),
    (backends_are_closed, "kernels/cpu/rvq.py", LAZY + "from ..triton import rvq"),
    (backends_are_closed, "kernels/cpu/rvq.py", "import triton.language as tl"),
    (backends_are_closed, "kernels/cpu/rvq.py", "from ...runtime.ops import OPS"),
    (backends_are_closed, "kernels/triton/rvq.py", "from fastmimi import reference"),
    (only_dispatch_imports_backends, "fastmimi/models/mimi.py", "from ..reference import rvq"),
    (only_dispatch_imports_backends, "fastmimi/models/mimi.py", LAZY + "import fastmimi.kernels.cpu.rvq"),
    (only_dispatch_imports_backends, "fastmimi/models/mimi.py", LAZY + "import_module('fastmimi.reference.rvq')"),
    (only_dispatch_imports_backends, "fastmimi/models/mimi.py", LAZY + "import_module(f'..kernels.{op}', __package__)"),
    (only_dispatch_imports_backends, "fastmimi/compat/moshi.py", "from ..reference.rvq import rvq"),
    (only_dispatch_imports_backends, "fastmimi/runtime/dispatch.py", "from .. import reference"),
    (only_dispatch_imports_backends, "fastmimi/runtime/dispatch.py", "import_module(name)"),
    (module_names_are_literals, "fastmimi/models/mimi.py", LAZY + "importlib.import_module(name)"),
    (module_names_are_literals, "fastmimi/models/mimi.py", LAZY + "import_module(f'fastmimi.{backend}')"),
    (floors_import_downwards, "fastmimi/errors.py", "from .runtime import layout"),
    (floors_import_downwards, "fastmimi/runtime/tiles.py", "import fastmimi.models.config"),
    (floors_import_downwards, "fastmimi/runtime/tiles.py", LAZY + "from ..models import config"),
    (floors_import_downwards, "fastmimi/models/mimi.py", LAZY + "from ..checkpoints.weights import read"),
    (floors_import_downwards, "fastmimi/models/mimi.py", "from .. import __version__"),
    (floors_import_downwards, "fastmimi/models/seanet.py", "import fastmimi.io.audio"),
    (floors_import_downwards, "fastmimi/models/jodio.py", "from ..checkpoints.weights import load"),
    (floors_import_downwards, "fastmimi/models/jodio.py", LAZY + "from ..io.audio import read"),
    (floors_import_downwards, "fastmimi/runtime/dispatch.py", "from ..compat import moshi"),
    (floors_import_downwards, "fastmimi/compat/moshi.py", "from ..cli import main"),
    (floors_import_downwards, "fastmimi/checkpoints/weights.py", LAZY + "from ..train.loop import train"),
    (floors_import_downwards, "fastmimi/checkpoints/weights.py", "from ..compat.transformers import MimiModel"),
    (floors_import_downwards, "fastmimi/odds/ends.py", "from ..errors import InputError"),
    (modules_for_kernels_import_only_each_other, "fastmimi/runtime/packing.py", "from ..errors import InputError"),
    (only_validation_imports_pydantic, "fastmimi/models/config.py", "from pydantic import Field"),
    (the_package_is_lazy, "fastmimi/__init__.py", "from .models.mimi import Mimi"),
    (the_package_is_lazy, "fastmimi/models/transformer.py", "from transformers import MimiConfig"),
    (the_package_is_lazy, "fastmimi/checkpoints/weights.py", LAZY + "import moshi"),
    (top_level_packages_are_not_imported, "tests/kernels/test_rvq.py", "from reference.rvq import rvq"),
    (top_level_packages_are_not_imported, "bench/bench_ops.py", LAZY + "import kernels.cpu"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_follows_the_rule(rule: Rule, repository: Tree) -> None:
    assert {"fastmimi/runtime/dispatch.py", "fastmimi/models/mimi.py", "reference/__init__.py"} <= repository.keys()
    assert rule(repository) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_valid_tree_follows_the_rule(rule: Rule) -> None:
    assert rule(VALID) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"), VIOLATIONS, ids=[f"{rule.__name__}-{path}" for rule, path, _ in VIOLATIONS]
)
def test_the_rule_finds_a_violation(rule: Rule, path: str, source: str) -> None:
    assert rule({**VALID, path: source})


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(RULES)
