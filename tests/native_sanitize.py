"""`make native-sanitize`: the tests of the native kernels with a library built for the address and UB sanitizers.

The library is built beside the usual one, in a temporary folder, and takes its place by an argument of the test run.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "kernels" / "cpu" / "native"
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
VARIANTS = run_path(str(NATIVE.parent / "_variants.py"))["compiler_options"](platform.machine())
TESTS = [
    "tests/kernels/test_native.py",
    "tests/runtime/test_quantized.py",
    "tests/kernels/test_transformer_layer.py",
    "tests/kernels/test_window_attention.py",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        objects = [build(Path(folder, "library.o"), "library.cpp", [])]
        objects += [
            build(Path(folder, f"{name}.o"), "variant.cpp", [f"-DVARIANT={name}", *options])
            for name, options in VARIANTS.items()
        ]
        library = Path(folder, "libfastmimi.so")
        subprocess.run(["g++", "-shared", *SANITIZERS, "-o", library, *objects], check=True)
        runtimes = [runtime(name) for name in ("libasan.so", "libubsan.so")]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's and PyTorch's own
            "OMP_NUM_THREADS": "2",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        command += ["--native-library", str(library), "-k", "not streams_in_threads"]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


def build(target: Path, source: str, flags: list[str]) -> Path:
    subprocess.run(["g++", *FLAGS, *SANITIZERS, *flags, "-c", NATIVE / source, "-o", target], check=True)
    return target


def runtime(name: str) -> str:
    """Where the compiler keeps a sanitizer's runtime, which must be loaded before Python."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
