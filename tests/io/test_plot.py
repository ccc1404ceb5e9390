"""Plots: long and short audio, and the frequency axis of spectrograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmimi.io import plot


def test_a_plot_shows_the_beginning_of_long_audio(tmp_path: Path) -> None:
    track = plot.Track(limit=30 * 24_000 - 100)
    blocks = [np.full((24_000, 2), i, np.float32) for i in range(40)]
    assert all(a is b for a, b in zip(track.tee(blocks), blocks, strict=True))
    assert track.total == 40 * 24_000
    np.testing.assert_array_equal(track.audio, np.repeat(np.arange(30), 24_000)[:-100])
    options = {"sample_rate": 24_000, "frame_size": 1920, "codebook_size": 100, "title": "a.wav"}
    plot.draw(tmp_path / "a.svg", "svg", np.zeros((8, 500), int), {"original": track.audio}, **options)
    assert "a.wav (the first 30 of 40.0 s)" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("samples", [1, 2, 1919, 50_000])
def test_plots_of_audio_of_any_length(tmp_path: Path, samples: int) -> None:
    options = {"sample_rate": 24_000, "frame_size": 1920, "codebook_size": 100, "title": "a.wav"}
    codes = np.zeros((1, max(1, -(-samples // 1920))), int)
    plot.draw(tmp_path / "a.png", "png", codes, {"decoded": np.zeros(samples, np.float32)}, **options)
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_a_tone_is_drawn_at_its_frequency() -> None:
    rate, hz = 24_000, 1_000.0
    tone = 0.5 * np.sin(2 * np.pi * hz * np.arange(rate) / rate)
    image = plot.spectrogram(tone, rate)
    row = image[:, image.shape[1] // 2].argmax()
    mel = 2595 * np.log10(1 + np.array([hz, rate / 2]) / 700)
    assert row / (len(image) - 1) == pytest.approx(mel[0] / mel[1], abs=1 / len(image))
    assert image.max() == pytest.approx(20 * np.log10(0.5), abs=1.5)
