"""Who may import whom.

A rule is a function from a `Tree`, {path: source}, to sentences, one for each place that breaks it. Each rule
runs on the repository, and on small trees made to break it (`BROKEN`): a rule gone blind is noticed too.

Imports count wherever they stand, also inside functions, where a lazy import hides. Only `if TYPE_CHECKING:`
is left out: it never runs.
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

ROOMS = ("fastmimi.reference", "fastmimi.kernels")
ROOM_MAY_USE = {
    "reference": {"torch", "einops"},
    "kernels.triton": {"torch", "triton"},
    "kernels.cpu": {"torch"},
    "kernels.onednn": {"torch"},
}
FOR_KERNELS = {"memory", "int8"}  # leaves: how tensors and weights lie in memory
FOR_ALL = {"errors", "validation", "sizes", "masks", *FOR_KERNELS}  # leaves that leaves may use
LEAVES = {*FOR_ALL, "config", "state", "ops"}
# The model and its parts import, of ours, one another and nothing around them.
MODEL_SIDE = {
    *LEAVES,
    "model",
    "jodio",
    "dispatch",
    "library",
    "programs",
    "errors",
    "checks",
    "codec",
    "quantizer",
    "ragged",
    "seanet",
    "tiles",
    "transformer",
}
STORES_ITSELF = "jodio"  # whose class reads and writes checkpoints, when asked for it
DOORS = {  # who may import these, beside themselves; "" is fastmimi/__init__
    "compat": {"cli", ""},
    "train": {"cli"},
    "cli": {"__main__"},
}
PEERS = ("transformers", "moshi", "rustymimi")
KNOW_PEERS = {"compat", "train"}
COMPUTED = "<computed>"


class Import(NamedTuple):
    where: str  # "fastmimi/model.py:14"
    part: str  # the part of the house it stands in, see `part_of`
    name: str  # "fastmimi.ops.OPS", relative imports resolved
    lazy: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.where} imports {self.name}"


# ---- reading imports


def module_of(path: str) -> str:
    """'kernels/cpu/x.py' -> 'fastmimi.kernels.cpu.x'; 'fastmimi/__init__.py' -> 'fastmimi'."""
    names = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(["fastmimi", *names] if names[0] in ("kernels", "reference") else names)


def part_of(module: str) -> str:
    """'reference', 'kernels.triton', 'compat', 'model'...; '' for fastmimi itself."""
    names = module.split(".")[1:]
    return ".".join(names[:2] if names[:1] == ["kernels"] else names[:1])


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def imports_of(path: str, source: str) -> list[Import]:
    module = module_of(path)
    package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
    found = _walk(ast.parse(source, path), package, lazy=False)
    return [Import(f"{path}:{line}", part_of(module), name, lazy) for line, name, lazy in found]


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
                yield node.lineno, _written(name, package), lazy
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            lazy = True
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, lazy=lazy)


def _resolve(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*above, *filter(None, name[level:].split("."))])


def _written(node: ast.AST, package: str) -> str:
    """The module named to `import_module`, as far as it is written out: f"fastmimi.{x}" may be any."""
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


def rooms_are_shut(tree: Tree) -> list[str]:
    """A room imports torch, its own language and itself; never another room or the house, but how tensors lie."""
    wrong = []
    for found in in_package(tree):
        allowed = ROOM_MAY_USE.get(found.part)
        if allowed is None or inside(found.name, f"fastmimi.{found.part}"):
            continue
        if found.part.startswith("kernels") and any(inside(found.name, f"fastmimi.{leaf}") for leaf in FOR_KERNELS):
            continue
        if found.name.split(".")[0] not in allowed | sys.stdlib_module_names:
            wrong.append(f"{found}: {found.part} may use {', '.join(sorted(allowed))} and itself")
    return wrong


def only_dispatch_opens_rooms(tree: Tree) -> list[str]:
    """Nothing but dispatch imports reference or kernels, and dispatch does so in functions only."""
    wrong = []
    for found in in_package(tree):
        room = inside(found.name, *ROOMS) and not inside(f"fastmimi.{found.part}", *ROOMS)
        if room and found.part != "dispatch":
            wrong.append(f"{found}: only dispatch chooses implementations")
        if (room or found.name == COMPUTED) and found.part == "dispatch" and not found.lazy:
            wrong.append(f"{found}: dispatch imports a room when it is asked for it")
    return wrong


def module_names_are_written_out(tree: Tree) -> list[str]:
    """A computed module name escapes these rules: dispatch and fastmimi/__init__ alone may use one."""
    computed = [found for found in in_package(tree) if found.name == COMPUTED]
    return [f"{found}: name the module" for found in computed if found.part not in ("dispatch", "")]


def leaves_import_nothing_of_ours(tree: Tree) -> list[str]:
    ours = [found for found in in_package(tree) if inside(found.name, "fastmimi")]
    return [
        f"{found}: {found.part} is a leaf"
        for found in ours
        if found.part in LEAVES and part_of(found.name) not in FOR_ALL
    ]


def only_validation_imports_pydantic(tree: Tree) -> list[str]:
    """Configurations are plain dataclasses, and errors are InputError: no other module sees the library."""
    wrong = [found for found in in_package(tree) if inside(found.name, "pydantic") and found.part != "validation"]
    return [f"{found}: ask fastmimi.validation" for found in wrong]


def the_model_knows_nothing_around_it(tree: Tree) -> list[str]:
    """The model's side never imports checkpoints, files, faces, training or the command line."""
    wrong = []
    for found in in_package(tree):
        ours = found.part in MODEL_SIDE and inside(found.name, "fastmimi") and not inside(found.name, *ROOMS)
        stores = found.part == STORES_ITSELF and part_of(found.name) == "weights" and found.lazy
        if ours and part_of(found.name) not in {"", *MODEL_SIDE} and not stores:
            wrong.append(f"{found}: {found.part} is on the model's side, MODEL_SIDE")
    return wrong


def doors_open_outwards(tree: Tree) -> list[str]:
    """Training is for training, the command line for nobody, the faces for it and the user."""
    wrong = []
    for found in in_package(tree):
        for door, users in DOORS.items():
            if inside(found.name, f"fastmimi.{door}") and found.part not in {door, *users}:
                wrong.append(f"{found}: {door} is imported by {', '.join(sorted(users)) or 'nobody'} alone")
    return wrong


def the_package_is_lazy(tree: Tree) -> list[str]:
    """`import fastmimi` loads nothing more; a peer is loaded by its face, transformers on demand too."""
    wrong = []
    for found in in_package(tree):
        if found.part == "" and not found.lazy and inside(found.name, "fastmimi"):
            wrong.append(f"{found}: fastmimi/__init__ loads a module when a name of it is asked for")
        if inside(found.name, *PEERS) and found.part not in KNOW_PEERS:
            if not found.lazy:
                wrong.append(f"{found}: at the top only {' and '.join(sorted(KNOW_PEERS))} import a peer")
            elif not inside(found.name, "transformers"):
                wrong.append(f"{found}: an optional peer is for {' and '.join(sorted(KNOW_PEERS))}")
    return wrong


def top_level_rooms_are_not_imported(tree: Tree) -> list[str]:
    """`import kernels` means the PyPI package of that name; ours is fastmimi.kernels. In tests too."""
    everywhere = [found for path, source in tree.items() for found in imports_of(path, source)]
    wrong = [found for found in everywhere if inside(found.name, "kernels", "reference")]
    return [f"{found}: say fastmimi.{found.name}" for found in wrong]


# ---- the tests

RULES: list[Rule] = [
    rooms_are_shut,
    only_dispatch_opens_rooms,
    module_names_are_written_out,
    leaves_import_nothing_of_ours,
    only_validation_imports_pydantic,
    the_model_knows_nothing_around_it,
    doors_open_outwards,
    the_package_is_lazy,
    top_level_rooms_are_not_imported,
]
LAZY = "def f():\n    "
SOUND: Tree = {
    "fastmimi/__init__.py": LAZY + "from fastmimi.compat import transformers",
    "fastmimi/ops.py": "import typing\nif typing.TYPE_CHECKING:\n    from .state import StreamState",
    "fastmimi/dispatch.py": "from .ops import OPS\n" + LAZY + "importlib.import_module(room)",
    "fastmimi/model.py": "from . import dispatch\nfrom .ops import OPS\n" + LAZY + "import transformers",
    "fastmimi/compat/moshi.py": "import moshi\nfrom ..model import Mimi",
    "fastmimi/cli.py": "from .compat import moshi\nfrom . import model",
    "kernels/cpu/rvq.py": "import torch\nfrom ... import int8, memory\nfrom ._packing import pack",
    "kernels/triton/rvq.py": "import torch\nimport triton.language as tl",
    "reference/rvq.py": "import math\nimport torch\nfrom . import norm\nfrom fastmimi.reference import norm",
    "tests/test_rvq.py": "import moshi\nfrom fastmimi.reference.rvq import rvq",
}
BROKEN: list[tuple[Rule, str, str]] = [
    (rooms_are_shut, "reference/rvq.py", "import triton"),
    (rooms_are_shut, "reference/rvq.py", LAZY + "import numpy"),
    (rooms_are_shut, "reference/rvq.py", "from ..ops import OPS"),
    (rooms_are_shut, "reference/rvq.py", "from fastmimi.kernels.cpu import rvq"),
    (rooms_are_shut, "kernels/cpu/rvq.py", LAZY + "from ..triton import rvq"),
    (rooms_are_shut, "kernels/cpu/rvq.py", "import triton.language as tl"),
    (rooms_are_shut, "kernels/triton/rvq.py", "from fastmimi import reference"),
    (rooms_are_shut, "kernels/cpu/rvq.py", "from ...ops import OPS"),
    (rooms_are_shut, "reference/rvq.py", "from fastmimi import memory"),
    (only_dispatch_opens_rooms, "fastmimi/model.py", "from .reference import rvq"),
    (only_dispatch_opens_rooms, "fastmimi/model.py", LAZY + "import fastmimi.kernels.cpu.rvq"),
    (only_dispatch_opens_rooms, "fastmimi/model.py", LAZY + "import_module('fastmimi.reference.rvq')"),
    (only_dispatch_opens_rooms, "fastmimi/model.py", LAZY + "import_module(f'.kernels.{op}', __package__)"),
    (only_dispatch_opens_rooms, "fastmimi/compat/moshi.py", "from ..reference.rvq import rvq"),
    (only_dispatch_opens_rooms, "fastmimi/dispatch.py", "from . import reference"),
    (only_dispatch_opens_rooms, "fastmimi/dispatch.py", "import_module(name)"),
    (module_names_are_written_out, "fastmimi/model.py", LAZY + "importlib.import_module(name)"),
    (module_names_are_written_out, "fastmimi/model.py", LAZY + "import_module(f'fastmimi.{room}')"),
    (leaves_import_nothing_of_ours, "fastmimi/config.py", LAZY + "from .weights import read"),
    (leaves_import_nothing_of_ours, "fastmimi/state.py", "import fastmimi.config"),
    (leaves_import_nothing_of_ours, "fastmimi/ops.py", "from . import state"),
    (only_validation_imports_pydantic, "fastmimi/config.py", "from pydantic import Field"),
    (the_model_knows_nothing_around_it, "fastmimi/model.py", LAZY + "from .weights import read"),
    (the_model_knows_nothing_around_it, "fastmimi/seanet.py", "import fastmimi.audio"),
    (the_model_knows_nothing_around_it, "fastmimi/jodio.py", "from .weights import load"),
    (the_model_knows_nothing_around_it, "fastmimi/jodio.py", LAZY + "from .audio import read"),
    (the_model_knows_nothing_around_it, "fastmimi/dispatch.py", "from .compat import moshi"),
    (doors_open_outwards, "fastmimi/__init__.py", LAZY + "from fastmimi import train"),
    (doors_open_outwards, "fastmimi/compat/moshi.py", "from ..cli import main"),
    (doors_open_outwards, "fastmimi/weights.py", LAZY + "from .train.loop import train"),
    (doors_open_outwards, "fastmimi/weights.py", "from .compat.transformers import MimiModel"),
    (the_package_is_lazy, "fastmimi/__init__.py", "from .model import Mimi"),
    (the_package_is_lazy, "fastmimi/transformer.py", "from transformers import MimiConfig"),
    (the_package_is_lazy, "fastmimi/weights.py", LAZY + "import moshi"),
    (top_level_rooms_are_not_imported, "tests/test_rvq.py", "from reference.rvq import rvq"),
    (top_level_rooms_are_not_imported, "bench/bench_ops.py", LAZY + "import kernels.cpu"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, repository: Tree) -> None:
    assert {"fastmimi/dispatch.py", "fastmimi/model.py", "reference/__init__.py"} <= repository.keys()
    assert rule(repository) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_keeps_the_rule(rule: Rule) -> None:
    assert rule(SOUND) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"), BROKEN, ids=[f"{rule.__name__}-{path}" for rule, path, _ in BROKEN]
)
def test_the_rule_sees_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert rule({**SOUND, path: source})


def test_every_rule_is_broken_somewhere() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
