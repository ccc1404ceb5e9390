"""Semantic distillation (section 3.3.3): the first codebook learns what a model of speech knows.

The teacher, WavLM (arXiv 2110.13900), hears the audio at 16 kHz and sees the future; its embeddings at 50 Hz are
averaged to the codec's 12.5 Hz by a window of 8, centred on each frame. The student is a linear projection of what the
semantic levels decode to; the loss is one minus the cosine of the two.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel
from transformers.utils import logging

from ..errors import InputError
from .config import DistillationConfig

REACH = 80  # samples that the teacher's convolutions look beyond their hop, divided over both ends: 50 Hz exactly
POOL, STRIDE = 8, 4


class Distillation(nn.Module):
    """The teacher, frozen, and the student's projection."""

    def __init__(self, config: DistillationConfig, hidden: int):
        super().__init__()
        assert config.teacher is not None
        self.normalize = config.normalize
        self.__dict__["teacher"] = teacher(config.teacher)  # no part of what is trained and kept
        self.project = nn.Linear(hidden, self.teacher.config.hidden_size)

    teacher: WavLMModel

    @torch.no_grad()
    def targets(self, heard: Tensor) -> Tensor:
        """Audio [B, N] at 16 kHz -> embeddings [B, T, width] at 12.5 Hz."""
        if self.teacher.device != heard.device:
            self.teacher.to(heard.device)
        if self.normalize:
            heard = (heard - heard.mean(dim=1, keepdim=True)) / (heard.var(dim=1, keepdim=True) + 1e-7).sqrt()
        frames = self.teacher(F.pad(heard, (REACH // 2, REACH // 2))).last_hidden_state.mT  # [B, width, 4 T]
        around = (POOL - STRIDE) // 2
        return F.avg_pool1d(frames, POOL, STRIDE, padding=around, count_include_pad=False).mT

    def forward(self, semantic: Tensor, targets: Tensor) -> Tensor:
        """What the semantic levels decode to [B, hidden, T], and targets [B, T', width] -> 1 - their cosine."""
        frames = min(semantic.shape[-1], targets.shape[1])
        student = self.project(semantic[..., :frames].mT)
        return 1 - F.cosine_similarity(student.float(), targets[:, :frames].float(), dim=-1).mean()


def teacher(source: str) -> WavLMModel:
    """WavLM of a hub id or a directory; of a config.json, with random weights. In eval mode, frozen."""
    path = Path(source)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"distillation.teacher must be a hub id, a directory or a config.json, got {source!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WavLMModel(WavLMConfig.from_json_file(path))
    else:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # of a head that is not loaded
        try:
            model = WavLMModel.from_pretrained(source)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"distillation.teacher {source!r} could not be loaded: {reason}") from None
        finally:
            logging.set_verbosity(verbosity)
    return model.eval().requires_grad_(False)
