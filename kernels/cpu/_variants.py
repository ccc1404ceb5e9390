"""The variants of the native library, best first: the instruction sets that each is compiled for and needs.

setup.py compiles those of the machine's architecture; _native.py chooses one.
"""

from __future__ import annotations

AVX2 = ("avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
VARIANTS = {
    "avx512bf16": (*AVX512, "avx512bf16", "avx512vnni"),  # every processor with the former has the latter
    "avx512": AVX512,
    "avx2": AVX2,
    "neon": ("neon",),  # which every AArch64 processor has
    "portable": (),
}


def compiler_options(machine: str) -> dict[str, list[str]]:
    """The variants for a machine ("x86_64", "aarch64": what `uname -m` says), each with the compiler's options."""
    if machine in ("aarch64", "arm64"):
        return {"neon": ["-DNEON"], "portable": []}  # the compiler needs no option; the macro selects the intrinsics
    if machine not in ("x86_64", "amd64"):
        return {"portable": []}
    return {
        name: [f"-m{instructions}" for instructions in sets] + ["-mprefer-vector-width=512"] * ("avx512f" in sets)
        for name, sets in VARIANTS.items()
        if name != "neon"
    }
