"""Fixtures of the tests of training."""

from pathlib import Path

import accelerate
import pytest
import soundfile
import torch

from fastmimi.train.step import TrainingStep

SPEECH = Path(__file__).resolve().parents[1] / "data" / "synthetic.ogg"  # from a speech synthesizer


@pytest.fixture
def make_training_step(tiny_training):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return TrainingStep(tiny_training(**changes), accelerate.Accelerator(cpu=True))

    return make


@pytest.fixture
def speech(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    audio, rate = soundfile.read(SPEECH, dtype="float32")
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", audio[i * rate : (i + 1) * rate + 1000], rate)
    return folder
