"""The wheel contains every module and works outside the repository; importing fastmimi loads nothing heavy.

The wheel is built from a copy of the sources, since a build leaves files behind, and installed in a new environment.
A .pth file there adds the site-packages of this environment, for torch and the other dependencies. Python does not
read the .pth files of a folder that is added so, and hence does not find an editable fastmimi of this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "fastmimi", "kernels", "reference")

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import fastmimi
files, failed = {"fastmimi": fastmimi.__file__}, {}
for module in pkgutil.walk_packages(fastmimi.__path__, "fastmimi.", onerror=lambda name: None):
    if module.name == "fastmimi.__main__":
        continue
    try:
        files[module.name] = importlib.import_module(module.name).__file__
    except ImportError as error:
        failed[module.name] = str(error)
json.dump({"files": files, "failed": failed, "version": fastmimi.__version__}, sys.stdout)
"""


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command; a failure shows it with the errors."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))[:200]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules() -> set[str]:
    """The names under which users import the modules of the repository."""
    paths = [path.relative_to(ROOT) for top in ("fastmimi", "kernels", "reference") for path in python_files(top)]
    names = [path.with_suffix("").parts for path in paths]
    names = [name if name[0] == "fastmimi" else ("fastmimi", *name) for name in names]
    return {".".join(name[:-1] if name[-1] == "__init__" else name) for name in names}


def python_files(top: str) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(ROOT / top):  # does not follow links: each file once
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that the package is built from, with its symbolic links."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if setuptools_can_build() else []
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def setuptools_can_build() -> bool:
    """True for the version that [build-system] in pyproject.toml requires; it needs no `wheel` package."""
    try:
        return int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment in which the wheel is installed."""
    fresh = tmp_path_factory.mktemp("fresh")
    venv.create(fresh, with_pip=False, symlinks=os.name != "nt")
    python = python_in(fresh)
    paths = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-I", "-c", paths, cwd=fresh).strip())
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=fresh,
    )
    return fresh


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def wheel_files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_contains_every_module(wheel: Path) -> None:
    files = {name for name in wheel_files(wheel) if name.endswith(".py")}
    names = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    assert names == modules()


def test_the_wheel_contains_assets_types_and_licence(wheel: Path) -> None:
    files = wheel_files(wheel)
    data = [path for path in (ROOT / "fastmimi" / "assets").rglob("*") if path.is_file()]
    data += (ROOT / "fastmimi" / "train").glob("*.yaml")
    data += (ROOT / "fastmimi" / "serve" / "page").iterdir()
    data += (ROOT / "fastmimi" / "export" / "browser").iterdir()
    names = {path.relative_to(ROOT).as_posix() for path in data}
    assert {f"fastmimi/{name}" for name in ("assets/demo/model.safetensors", "train/demo.yaml")} <= names
    assert {f"fastmimi/serve/page/{name}" for name in ("index.html", "main.js")} <= names
    assert any(name.endswith(".ogg") for name in names)
    assert names | {"fastmimi/py.typed"} <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    """`kernels` and `reference` are top-level folders of the repository, but not of site-packages."""
    top_level = {name.partition("/")[0] for name in wheel_files(wheel)}
    assert {top for top in top_level if not top.endswith(".dist-info")} == {"fastmimi"}


def test_the_wheel_is_for_any_python(wheel: Path) -> None:
    """The library is no Python extension: the wheel is tagged with the platform only, and only if it contains it."""
    libraries = [name for name in wheel_files(wheel) if name.endswith(".so")]
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert (platform != "any") == bool(libraries)


def test_a_wheel_without_the_library_is_for_any_platform(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not setuptools_can_build():
        pytest.skip("setuptools >= 77 is not installed here")
    copy = tmp_path / "source"
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "no_compiler"))
    command = ("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy)
    run(sys.executable, "-m", "pip", *command, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in wheel_files(built) if name.endswith(".so")]


@pytest.mark.skipif(sys.platform != "linux", reason="the library is stripped on Linux")
def test_the_library_is_stripped(wheel: Path) -> None:
    name = "fastmimi/kernels/cpu/native/libfastmimi.so"
    if name not in wheel_files(wheel):
        pytest.skip("there is no C++ compiler here")
    library = zipfile.ZipFile(wheel).read(name)
    assert b".symtab" not in library and b".debug_info" not in library  # names of its sections


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    """The links become folders in an sdist."""
    if not setuptools_can_build():
        pytest.skip("setuptools >= 77 is not installed here")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    command = ("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist)
    run(sys.executable, "-m", "pip", *command, cwd=tmp_path)
    assert wheel_files(next(tmp_path.glob("*.whl"))) == wheel_files(wheel)


def test_every_module_imports_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(python_in(installed), "-I", "-c", IMPORT_ALL, cwd=tmp_path))
    unavailable = {name for name, why in found["failed"].items() if triton_is_absent() and "triton" in why}
    assert {name: why for name, why in found["failed"].items() if name not in unavailable} == {}
    assert found["files"].keys() | unavailable == modules() - {"fastmimi.__main__"}
    strays = [file for file in found["files"].values() if not Path(file).is_relative_to(installed)]
    assert strays == []
    assert f'version = "{found["version"]}"' in (ROOT / "pyproject.toml").read_text()


def triton_is_absent() -> bool:
    """True where there are no wheels of Triton; elsewhere it is one of the package's requirements."""
    return not sys.platform.startswith("linux")


def test_public_names_resolve(installed: Path, tmp_path: Path) -> None:
    from fastmimi.compat.transformers import HALVES

    code = "import fastmimi; print([name for name in fastmimi.__all__ if getattr(fastmimi, name, None) is None])"
    missing = [] if HALVES else ["MimiDecoderModel", "MimiEncoderModel"]  # transformers has them since 5.20
    assert run(python_in(installed), "-I", "-c", code, cwd=tmp_path).strip() == str(missing)


def test_the_console_script_runs(installed: Path, tmp_path: Path) -> None:
    printed = run(python_in(installed).with_name("fastmimi"), "--help", cwd=tmp_path)
    for command in ("encode", "decode", "roundtrip", "info", "explain"):
        assert command in printed


def test_import_fastmimi_loads_nothing_heavy() -> None:
    """Beyond torch, only modules of the standard library and fastmimi itself."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import fastmimi; "
        "json.dump(sorted({name.partition('.')[0] for name in set(sys.modules) - before}), sys.stdout)"
    )
    loaded = set(json.loads(run(sys.executable, "-c", code, cwd=ROOT)))
    assert loaded - sys.stdlib_module_names == {"fastmimi"}


def test_the_reference_needs_no_triton() -> None:
    """With the import of Triton blocked, every reference imports, and a model runs on them."""
    names = sorted(name for name in modules() if name.startswith("fastmimi.reference."))
    assert names
    code = (
        "import sys; sys.modules['triton'] = None; import importlib, json, torch\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "import fastmimi\n"
        "mimi = fastmimi.load('random:0', impl='reference')\n"
        "audio = mimi.decode(mimi.encode(torch.zeros(1, 1, 1920)))\n"
        "assert audio.shape == (1, 1, 1920), audio.shape\n"
        "assert not [name for name in sys.modules if name.startswith('fastmimi.kernels')]\n"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


def test_transformers_imports_although_there_is_a_kernels_folder() -> None:
    """transformers probes for a package named `kernels`; from the repository's root it finds our folder."""
    code = "import kernels; from transformers import MimiConfig, MimiModel"
    run(sys.executable, "-c", code, cwd=ROOT)
