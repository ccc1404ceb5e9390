"""The ABI of the native library: the structures and enumerations that native/ declares by MIRRORED (native/abi.h).

Each entry point takes the address of one structure. The library contains the text of its declarations, with which
`differences` compares those of this module.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PAD_MODES = {"constant": 0, "replicate": 1, "reflect": 2}
ACTIVATIONS = {"none": 0, "elu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "relu": 5, "tanh": 6}
KINDS = {"full": 0, "half": 1, "int8": 2, "pairs": 3, "digits": 4}  # of products, native/gemm.h

pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
# In the structures, a step is a stride in elements.


class Input(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("dtype", integer), ("batch", long), ("length", long), ("channels", long),
        ("batch_step", long), ("step", long), ("left", long), ("right", long), ("pad_mode", integer),
        ("history", pointer), ("history_batch_step", long), ("history_step", long), ("first", pointer),
        ("active", pointer), ("rows", pointer),
    )  # fmt: skip


class Weights(ctypes.Structure):
    _fields_ = (
        ("packed", pointer), ("outputs", long), ("taps", long), ("bias", pointer), ("dequantize", pointer),
        ("bytes_per_weight", long),
    )  # fmt: skip


class Output(ctypes.Structure):
    _fields_ = (
        ("y", pointer), ("dtype", integer), ("row_step", long), ("bias", pointer), ("post", integer),
        ("scale", pointer), ("dequantize", pointer), ("residual", pointer), ("residual_dtype", integer),
        ("residual_row_step", long),
    )  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = (
        ("q", pointer), ("k", pointer), ("v", pointer), ("y", pointer), ("dtype", integer),
        ("batch", long), ("heads", long), ("kv_heads", long), ("length", long), ("dim", long),
        ("q_batch", long), ("q_head", long), ("q_step", long), ("k_batch", long), ("k_head", long), ("k_step", long),
        ("v_batch", long), ("v_head", long), ("v_step", long),
        ("inv_freq", pointer), ("rope_scale", real), ("interleaved", ctypes.c_bool), ("window", long),
        ("offset", pointer), ("cache_k", pointer), ("cache_v", pointer), ("active", pointer), ("rows", pointer),
    )  # fmt: skip


class Linear(ctypes.Structure):
    _fields_ = (
        ("packed", pointer), ("bias", pointer), ("dequantize", pointer), ("scale", pointer), ("outputs", long),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("y", pointer), ("dtype", integer), ("rows", long), ("channels", long), ("hidden", long),
        ("norm1_weight", pointer), ("norm1_bias", pointer), ("norm2_weight", pointer), ("norm2_bias", pointer),
        ("epsilon", real), ("rms", ctypes.c_bool),
        ("activation", integer), ("qkv", Linear), ("out", Linear), ("fc1", Linear), ("fc2", Linear),
        ("attention", Attention),
    )  # fmt: skip


class ConvCall(ctypes.Structure):
    _fields_ = (
        ("input", Input), ("weights", Weights), ("output", Output), ("kind", integer), ("stride", long),
        ("dilation", long), ("pre", integer), ("out_length", long), ("out_batch_step", long),
        ("residual_batch_step", long), ("threads", integer),
    )  # fmt: skip


class ResblockCall(ctypes.Structure):
    _fields_ = (
        ("input", Input), ("weights1", Weights), ("weights2", Weights), ("output", Output), ("kind", integer),
        ("dilation", long), ("out_length", long), ("out_batch_step", long), ("residual_batch_step", long),
        ("threads", integer),
    )  # fmt: skip


class DepthwiseCall(ctypes.Structure):
    _fields_ = (
        ("input", Input), ("weight", pointer), ("bias", pointer), ("y", pointer), ("stride", long), ("taps", long),
        ("pre", integer), ("rows", long), ("threads", integer),
    )  # fmt: skip


class AdvanceCall(ctypes.Structure):
    _fields_ = (("input", Input),)


class AttentionCall(ctypes.Structure):
    _fields_ = (("attention", Attention), ("threads", integer))


class LayerCall(ctypes.Structure):
    _fields_ = (("layer", Layer), ("kind", integer), ("threads", integer))


class RvqEncodeCall(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("dtype", integer), ("x_step", long), ("rows", long), ("dim", long), ("levels", long),
        ("size", long), ("codebooks", pointer), ("packed", pointer), ("norms", pointer), ("codes", pointer),
        ("threads", integer),
    )  # fmt: skip


class RvqDecodeCall(ctypes.Structure):
    _fields_ = (
        ("codes", pointer), ("level_step", long), ("row_step", long), ("codebooks", pointer), ("levels", long),
        ("rows", long), ("size", long), ("dim", long), ("y", pointer), ("dtype", integer), ("threads", integer),
    )  # fmt: skip


ENTRIES: dict[str, type[ctypes.Structure]] = {
    "conv": ConvCall, "resblock": ResblockCall, "depthwise": DepthwiseCall, "advance": AdvanceCall,
    "attention": AttentionCall, "layer": LayerCall, "rvq_encode": RvqEncodeCall, "rvq_decode": RvqDecodeCall,
}  # fmt: skip
ENUMERATIONS: dict[str, Iterable[str]] = {
    "Dtype": ("f32", "bf16"), "PadMode": PAD_MODES, "Activation": ACTIVATIONS, "Kind": KINDS,
}  # fmt: skip


Members = list[tuple[str, str]]  # names and types of fields; the type of an enumerator is ""


def differences(declarations: Iterable[tuple[str, int]]) -> list[str]:
    """What differs between C declarations, each with its size in bytes, and those of this module; empty if they agree.

    "Input" stands for another size, "Input.step" for another position or type; or only one side has it.
    """

    def table(name: str, members: Members, size: int) -> dict[str, object]:
        return {name: size} | {f"{name}.{member}": (i, kind) for i, (member, kind) in enumerate(members)}

    theirs: dict[str, object] = {}
    for text, size in declarations:
        theirs |= table(*_parse(text), size)
    mine: dict[str, object] = {}
    for structure in _structures(ENTRIES.values()):
        members = [(field, kind.__name__.removeprefix("c_")) for field, kind, *_ in structure._fields_]
        mine |= table(structure.__name__, members, ctypes.sizeof(structure))
    for name, enumerators in ENUMERATIONS.items():
        mine |= table(name, [(enumerator.upper(), "") for enumerator in enumerators], ctypes.sizeof(integer))
    return sorted({key for key, _ in mine.items() ^ theirs.items()})


def _parse(text: str) -> tuple[str, Members]:
    """Name and members of a C declaration such as "struct Rows { const float *x, *y; long count = 0; }"."""
    keyword, name, body = text.split(" ", 2)
    if keyword == "enum":
        return name, [(enumerator, "") for enumerator in body.strip("{}").split(", ")]
    members = []
    for statement in body.strip("{; }").split("; "):
        kind, _, declarators = statement.removeprefix("const ").partition(" ")
        for declarator in declarators.split(", "):
            pointed = "*" in kind + declarator
            members.append((declarator.split(" = ")[0].lstrip("*"), "void_p" if pointed else kind))
    return name, members


def _structures(kinds: Iterable[type]) -> Iterator[type[ctypes.Structure]]:
    """The structures among `kinds`, and those nested in them."""
    for kind in kinds:
        if issubclass(kind, ctypes.Structure):
            yield kind
            yield from _structures(field[1] for field in kind._fields_)
