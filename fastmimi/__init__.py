"""fastmimi: the Mimi neural audio codec, fast, streaming and trainable; a drop-in for its other implementations.

    mimi = fastmimi.load("kyutai/mimi")
    codes = mimi.encode(audio)  # [B, 1, N] at 24 kHz -> [B, K, T] at 12.5 Hz
    audio = mimi.decode(codes)

Names load on first use, so that `import fastmimi` costs little: no transformers until one of its faces is named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compat.replace import replace_mimi, restore_mimi
    from .compat.transformers import MimiConfig, MimiDecoderModel, MimiEncoderModel, MimiModel
    from .config import CodecConfig, JodioConfig
    from .dispatch import explain
    from .errors import InputError
    from .jodio import JodioModel
    from .model import Mimi
    from .state import StreamState
    from .weights import load, save_kyutai, save_pretrained

_HOMES = {
    "CodecConfig": "config",
    "JodioConfig": "config",
    "JodioModel": "jodio",
    "InputError": "errors",
    "Mimi": "model",
    "MimiConfig": "compat.transformers",
    "MimiDecoderModel": "compat.transformers",
    "MimiEncoderModel": "compat.transformers",
    "MimiModel": "compat.transformers",
    "StreamState": "state",
    "explain": "dispatch",
    "load": "weights",
    "replace_mimi": "compat.replace",
    "restore_mimi": "compat.replace",
    "save_kyutai": "weights",
    "save_pretrained": "weights",
}
__all__ = [
    "CodecConfig",
    "InputError",
    "JodioConfig",
    "JodioModel",
    "Mimi",
    "MimiConfig",
    "MimiDecoderModel",
    "MimiEncoderModel",
    "MimiModel",
    "StreamState",
    "explain",
    "load",
    "replace_mimi",
    "restore_mimi",
    "save_kyutai",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("fastmimi")
    else:
        raise AttributeError(f"module 'fastmimi' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
