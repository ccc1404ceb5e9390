"""The metadata stands in pyproject.toml; here, the native library of the CPU kernels (kernels/cpu/native).

It is no Python extension: one file is compiled once for each instruction set and linked into a plain shared library,
which the kernels open. Without a C++ compiler, or where it fails, the package installs without it. So a wheel is for
any Python 3, of one platform with the library and of any without.
"""

from __future__ import annotations

import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "fastmimi.kernels.cpu.native.libfastmimi"
NATIVE = Path("fastmimi", "kernels", "cpu", "native")
# The platform is the one that is built for: a cross build sets _PYTHON_HOST_PLATFORM=linux-aarch64, as for any wheel.
MACHINE = sysconfig.get_platform().rpartition("-")[2]
VARIANTS = run_path(str(NATIVE.parent / "_variants.py"))["compiler_options"](MACHINE)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"]
# Linked without -fopenmp: OpenMP's symbols are bound, when the library is opened, to the runtime that PyTorch brought.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
STRIP = ["-s"] if sys.platform == "linux" else []  # no symbols but those that are opened, no debug information


def file_of(library: str) -> str:
    return str(Path(*library.split(".")).with_suffix(".so"))


class Wheel(bdist_wheel):
    """Tagged for what it holds."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not Path(self.bdist_dir, file_of(LIBRARY)).exists()
        return "py3", "none", super().get_tag()[2]


class BuildNative(build_ext):
    """Compiles the variants; what fails is told, and the package does without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return file_of(fullname)

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor() as pool:
            variants = list(pool.map(self.compile_variant, VARIANTS))
        try:
            objects = self.compile("library.cpp", self.build_temp, [])
            for made in variants:
                objects += made
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), extra_postargs=STRIP, target_lang="c++")
        except Exception as error:
            self.warn(f"the native CPU kernels are not built, and PyTorch's operations will run instead: {error}")

    def compile_variant(self, name: str) -> list[str]:
        """Object files; none where the compiler does not know the instructions."""
        try:
            flags = [*OPENMP, *VARIANTS[name], f"-DVARIANT={name}"]
            return self.compile("variant.cpp", str(Path(self.build_temp, name)), flags)
        except Exception as error:
            self.warn(f"the {name} variant of the native CPU kernels is not built: {error}")
            return []

    def compile(self, source: str, folder: str, flags: list[str]) -> list[str]:
        return self.compiler.compile([str(NATIVE / source)], output_dir=folder, extra_postargs=[*FLAGS, *flags])


setup(
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    ext_modules=[Extension(LIBRARY, [], optional=True)],
)
