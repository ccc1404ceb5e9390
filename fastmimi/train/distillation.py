"""Semantic distillation (Mimi paper, section 3.3.3) of a self-supervised speech model into the semantic codebook.

The teacher is WavLM (arXiv 2110.13900), which is not causal and takes audio at 16 kHz. Its embeddings at 50 Hz are
averaged to the codec's 12.5 Hz by pooling windows of 8, centred on each frame. The student is a linear projection of
the latents that the semantic levels decode to. The loss is one minus the cosine similarity of student and teacher.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel
from transformers.utils import logging

from ..errors import InputError

# samples by which the receptive field of the teacher's convolutions exceeds their hop; with this padding, half of it on
# each side, the teacher gives exactly 50 embeddings per second
TEACHER_PADDING = 80
POOL_WINDOW, POOL_STRIDE = 8, 4  # embeddings at 50 Hz


class Teacher:
    """The frozen WavLM whose embeddings are distilled; it is no part of checkpoints."""

    def __init__(self, source: str, normalize: bool, device: torch.device):
        self.model, self.normalize = load_teacher(source).to(device), normalize
        self.width: int = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, audio: Tensor) -> Tensor:
        """The teacher's embeddings: audio [B, N] at 16 kHz -> [B, T, width] at 12.5 Hz."""
        if self.normalize:
            audio = (audio - audio.mean(dim=1, keepdim=True)) / (audio.var(dim=1, keepdim=True) + 1e-7).sqrt()
        padded = F.pad(audio, (TEACHER_PADDING // 2, TEACHER_PADDING // 2))
        embeddings = self.model(padded).last_hidden_state.mT  # [B, width, 4 T]
        padding = (POOL_WINDOW - POOL_STRIDE) // 2
        return F.avg_pool1d(embeddings, POOL_WINDOW, POOL_STRIDE, padding=padding, count_include_pad=False).mT


class Distillation(nn.Module):
    """The student's projection, and its loss."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.project = nn.Linear(hidden, width)

    def forward(self, semantic: Tensor, targets: Tensor) -> Tensor:
        """The loss: 1 - the mean cosine similarity of student and targets.

        `semantic` [B, hidden, T] are the latents that the semantic levels decode to, `targets` [B, T', width] the
        teacher's embeddings; the longer of the two is cut to the length of the other.
        """
        frames = min(semantic.shape[-1], targets.shape[1])
        student = self.project(semantic[..., :frames].mT)
        return 1 - F.cosine_similarity(student.float(), targets[:, :frames].float(), dim=-1).mean()


def load_teacher(source: str) -> WavLMModel:
    """WavLM in eval mode, without gradients: of a hub id or a directory, or of a config.json, with random weights."""
    path = Path(source)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"distillation.teacher must be a hub id, a directory or a config.json, got {source!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WavLMModel(WavLMConfig.from_json_file(path))
    else:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no warning about the weights of a head, which are not used
        try:
            model = WavLMModel.from_pretrained(source)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"distillation.teacher {source!r} could not be loaded: {reason}") from None
        finally:
            logging.set_verbosity(verbosity)
    return model.eval().requires_grad_(False)
