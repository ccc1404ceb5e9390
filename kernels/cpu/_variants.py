"""The variants of the native library, best first: the instruction sets that each is compiled for and needs.

The names are those of the compiler's -m options. setup.py compiles the variants; _native.py chooses one.
"""

AVX2 = ("avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
VARIANTS = {
    "avx512bf16": (*AVX512, "avx512bf16", "avx512vnni"),  # every processor with the former has the latter
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": (),
}
