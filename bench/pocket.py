"""Pocket TTS with random weights of the published shapes, for tests and benchmarks: needs no download.

Functions import `pocket_tts` themselves, because that sets PyTorch to one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FRAME = 1920  # samples, 80 ms
POSITIONS = 16  # of Mimi's transformers in a frame


def published() -> dict[str, Any]:
    """The configurations that the package ships, by name."""
    from pocket_tts.utils.config import CONFIGS_DIR, load_config

    return {path.stem: load_config(path) for path in sorted(CONFIGS_DIR.glob("*.yaml"))}


def random_mimi(config: Any, seed: int = 0) -> Any:
    """Pocket TTS's own Mimi of a section `mimi` of a configuration; layer scales are large, so that layers count."""
    from pocket_tts.models.mimi import build_mimi
    from pocket_tts.modules.stateful_module import StatefulModule

    torch.manual_seed(seed)
    mimi = build_mimi(config).eval().requires_grad_(False)
    scale_up(mimi)
    for name, module in mimi.named_modules():
        if isinstance(module, StatefulModule):
            module._module_absolute_name = name
    return mimi


def scale_up(mimi: Any) -> None:
    for name, parameter in mimi.named_parameters():
        if name.endswith(".scale"):
            parameter.data.uniform_(0.2, 1.0)


def random_tts(name: str, folder: Path, *, quantize: bool = False) -> Any:
    """A `TTSModel` of a published configuration that never ends a text early, and takes the words w0, w1, ...

    quantize: its language model in int8, as by `TTSModel.load_model(quantize=True)`.
    """
    import tokenizers
    from pocket_tts import TTSModel
    from pocket_tts.quantization import RECOMMENDED_CONFIG, apply_dynamic_int8

    config = published()[name]
    table = config.flow_lm.lookup_table
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(table.n_bins)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table.tokenizer, table.tokenizer_path = "tokenizers", str(folder / "tokenizer.json")
    config.weights_path = config.weights_path_without_voice_cloning = None
    torch.manual_seed(0)
    tts = TTSModel._from_pydantic_config_with_weights(config, 0.3, 1, None, eos_threshold=float("inf"))
    scale_up(tts.mimi)
    if quantize:
        apply_dynamic_int8(tts.flow_lm, RECOMMENDED_CONFIG)
    return tts.eval()


def text(words: int) -> str:
    """A text of so many words, of which it takes 50 for 18.7 s of audio."""
    return " ".join(f"w{i}" for i in range(1, words + 1))


def decode(mimi: Any, latents: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
    """Latents [B, T, C] decoded as one generation, in chunks of `sizes` frames (None: at once)."""
    from pocket_tts.modules.stateful_module import increment_steps, init_states

    state, audio = init_states(mimi, len(latents), latents.shape[1] * POSITIONS), []
    for chunk in latents.split(sizes or latents.shape[1], dim=1):
        audio.append(mimi.decode_from_latent(chunk, state))
        increment_steps(mimi, state, POSITIONS * chunk.shape[1])
    return torch.cat(audio, dim=-1)
