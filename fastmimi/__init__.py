"""fastmimi: the Mimi neural audio codec, fast, streaming and trainable; a drop-in for its other implementations.

Audio is float [batch, channels, samples], codes are int64 [batch, codebooks, frames]:

    mimi = fastmimi.load("kyutai/mimi")
    codes = mimi.encode(audio)  # [B, 1, N] at 24 kHz -> [B, K, T] at 12.5 Hz
    audio = mimi.decode(codes)

Public names are imported on first use, which keeps `import fastmimi` cheap: transformers is imported only when one of
its drop-ins (such as `fastmimi.MimiModel`) is accessed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.weights import load, save_kyutai, save_pretrained
    from .compat.replace import replace_mimi, restore_mimi
    from .compat.transformers import MimiConfig, MimiDecoderModel, MimiEncoderModel, MimiModel
    from .corpus.codes import read_codes
    from .corpus.dataset import CodesDataset
    from .corpus.detokenize import detokenize
    from .corpus.tokenize import tokenize
    from .errors import InputError
    from .export.write import export_model
    from .models.config import CodecConfig as CodecConfig
    from .models.config import JodioConfig, MimiCodecConfig
    from .models.continuous import ContinuousMimi, ContinuousMimiConfig
    from .models.jodio import JodioModel
    from .models.mimi import Mimi
    from .runtime.dispatch import explain
    from .runtime.packing import packing_report
    from .runtime.state import StreamState
    from .serve.client import AsyncClient, Client
    from .serve.pool import StreamPool
    from .serve.slots import SlotPool

_MODULES = {
    "CodesDataset": "corpus.dataset",
    "CodecConfig": "models.config",  # MimiCodecConfig by its former name
    "ContinuousMimi": "models.continuous",
    "ContinuousMimiConfig": "models.continuous",
    "JodioConfig": "models.config",
    "JodioModel": "models.jodio",
    "AsyncClient": "serve.client",
    "Client": "serve.client",
    "InputError": "errors",
    "Mimi": "models.mimi",
    "MimiCodecConfig": "models.config",
    "MimiConfig": "compat.transformers",
    "MimiDecoderModel": "compat.transformers",
    "MimiEncoderModel": "compat.transformers",
    "MimiModel": "compat.transformers",
    "SlotPool": "serve.slots",
    "StreamPool": "serve.pool",
    "StreamState": "runtime.state",
    "detokenize": "corpus.detokenize",
    "explain": "runtime.dispatch",
    "export_model": "export.write",
    "load": "checkpoints.weights",
    "packing_report": "runtime.packing",
    "read_codes": "corpus.codes",
    "replace_mimi": "compat.replace",
    "restore_mimi": "compat.replace",
    "save_kyutai": "checkpoints.weights",
    "save_pretrained": "checkpoints.weights",
    "tokenize": "corpus.tokenize",
}
__all__ = [
    "AsyncClient", "Client", "CodesDataset", "ContinuousMimi", "ContinuousMimiConfig", "InputError", "JodioConfig",
    "JodioModel", "Mimi", "MimiCodecConfig", "MimiConfig", "MimiDecoderModel", "MimiEncoderModel", "MimiModel",
    "SlotPool", "StreamPool", "StreamState", "detokenize", "explain", "export_model", "load", "packing_report",
    "read_codes", "replace_mimi", "restore_mimi", "save_kyutai", "save_pretrained", "tokenize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("fastmimi")
    else:
        raise AttributeError(f"module 'fastmimi' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
