"""`make native-arm`: the tests of the native kernels on AArch64, cross-compiled and run by qemu-user.

Needs Debian with g++-aarch64-linux-gnu and qemu-user-static. Python and PyTorch for AArch64 are unpacked in .venv-arm
(0.7 GB), at the first run. Arguments are passed to pytest: `python tests/native_arm.py -k portable --threads 1`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARM = ROOT / ".venv-arm"
SYSTEM, SITE = ARM / "system", ARM / "site"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# Not qemu's default processor, on which PyTorch's convolutions end in an illegal instruction
PROCESSOR = "neoverse-n1"
DEBIAN = ["python3", "libstdc++6"]
# PyTorch's newer wheels for AArch64 on PyPI bring CUDA's libraries.
PACKAGES = ["torch==2.9.1", "einops", "hypothesis", "numpy", "pydantic", "pytest", "safetensors", "transformers"]
TESTS = ["tests/kernels/test_native.py", "tests/runtime/test_quantized.py"]
CHECK = """
from pathlib import Path
from fastmimi.kernels.cpu import _native
_native.library_path = lambda: Path({library!r})
assert _native.variants() == ("neon", "portable"), (_native.variants(), _native._load())
"""


def main() -> None:
    if missing := [tool for tool in (COMPILER, EMULATOR, "apt-get", "dpkg") if not shutil.which(tool)]:
        sys.exit(f"{' and '.join(missing)} not found: on Debian, apt-get install g++-{COMPILER[:-4]} qemu-user-static")
    if not SYSTEM.exists():
        unpack_python()
    if not SITE.exists():
        unpack_packages()
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        if code := run("-c", CHECK.format(library=str(library))):  # or all tests would be skipped
            sys.exit(code)
        options = ["-q", "-p", "no:cacheprovider", "--native-library", str(library), "--threads", "2"]
        sys.exit(run("-m", "pytest", *options, *TESTS, *sys.argv[1:]))


def unpack_python() -> None:
    """Debian's python3 for AArch64 and what it needs, from packages that apt-get finds without this system's state."""
    with tempfile.TemporaryDirectory(dir=made(ARM)) as folder:
        made(Path(folder, "lists", "partial")), made(Path(folder, "archives", "partial"))
        status = Path(folder, "status")
        status.touch()
        settings = {
            "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root",
            "Dir::State": folder, "Dir::State::status": status, "Dir::Cache": folder, "Debug::NoLocking": "true",
        }  # fmt: skip
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "install", "-y", "--download-only", "--no-install-recommends", *DEBIAN], check=True)
        system = made(Path(folder, "system"))
        for archive in Path(folder, "archives").glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, system], check=True)
        system.rename(SYSTEM)


def unpack_packages() -> None:
    """PyTorch and what else the tests import, in the versions of constraints.txt except PyTorch."""
    with tempfile.TemporaryDirectory(dir=made(ARM)) as folder:
        constraints, site = Path(folder, "constraints.txt"), Path(folder, "site")
        lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
        constraints.write_text("".join(line for line in lines if not line.startswith("torch==")))
        command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--target", site]
        command += ["--python-platform", "aarch64-manylinux_2_28", "--python-version", python().name[6:]]
        command += ["--only-binary", ":all:", "-c", constraints, *PACKAGES]
        subprocess.run(command, check=True)
        site.rename(SITE)


def build(folder: Path) -> Path:
    """The library, by setup.py as in any cross build."""
    compilers = {"CC": COMPILER.replace("g++", "gcc"), "CXX": COMPILER, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    subprocess.run(command, cwd=ROOT, env=os.environ | compilers, check=True)
    return next(folder.rglob("libfastmimi.so"))


def run(*arguments: str) -> int:
    """Run Python for AArch64 in the repository; returns its exit status."""
    environment = os.environ | {"PYTHONHOME": str(SYSTEM / "usr"), "PYTHONPATH": f"{SITE}:{ROOT}"}
    command = [EMULATOR, "-cpu", PROCESSOR, "-L", SYSTEM, python(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def python() -> Path:
    """The interpreter, named python3.N."""
    return next((SYSTEM / "usr" / "bin").glob("python3.[0-9]*"))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
