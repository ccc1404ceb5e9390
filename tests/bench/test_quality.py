"""bench/quality.py: delays of other codecs, the table, and codecs that are not installed."""

import numpy as np
import pytest
import quality
from typer.testing import CliRunner

from fastmimi.train.evaluate import Result


@pytest.mark.parametrize("delay", [-700, 0, 123, 4000])
def test_the_delay_of_a_codec_is_found(delay):
    original = np.random.default_rng(0).standard_normal(30_000)
    decoded = -0.01 + 0.3 * (original[-delay:] if delay < 0 else np.concatenate([np.zeros(delay), original]))
    found = quality.aligned(original, decoded)
    assert len(found) == len(original)
    inside = slice(5000, 25_000)
    np.testing.assert_allclose(found[inside], 0.3 * original[inside] - 0.01, atol=1e-9)


def test_a_table_has_means_and_clips_with_dashes_for_what_is_undefined():
    results = [Result("a.ogg", 8, 1.0, 0.2, 0.8, 0.6, None), Result("b.ogg", 8, 3.0, 0.4, 0.9, 0.7, None)]
    lines = quality.table([quality.Coded("demo, 8 codebooks", 1100, results)]).splitlines()
    assert "| demo, 8 codebooks | 1100 | 0.850 | 0.650 | - | 2.0 | 0.300 |" in lines
    assert "| demo, 8 codebooks, b.ogg | 1100 | 0.900 | 0.700 | - | 3.0 | 0.400 |" in lines


@pytest.mark.slow
def test_codecs_that_are_not_installed_are_left_out(request, monkeypatch):
    monkeypatch.setattr(quality.shutil, "which", lambda _: None)
    app = quality.typer.Typer()
    app.command()(quality.main)
    clip = str(request.config.rootpath / "fastmimi/assets/198-209-0000.ogg")
    done = CliRunner().invoke(app, [clip, "--codebooks", "3", "--codebooks", "99"])
    assert done.exit_code == 0
    assert "Opus at 6 kbps is left out: opusenc and opusdec not installed" in done.output
    assert "| demo, 3 codebooks | 412 |" in done.output and "99 codebooks" not in done.output
