"""Every example runs as its docstring says, offline, in a temporary folder; the microphone is simulated."""

from __future__ import annotations

import json
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

import fastmimi

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "spectrograms_and_codes.ipynb"
SPEECH = Path(__file__).resolve().parents[1] / "data" / "audio"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs `python examples/<script> <arguments>` in a temporary folder and returns what it prints."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def speech(tmp_path):
    """speech.wav in the temporary folder: 2.03 s, whose last frame is partial."""
    audio, rate = soundfile.read(next(SPEECH.glob("*.ogg")), dtype="float32")
    path = tmp_path / "speech.wav"
    soundfile.write(path, audio[: int(2.03 * rate)], rate)
    return path


def test_stream_file(run, speech):
    printed = run("stream_file.py", speech.name, "decoded.wav")
    assert "26 frames; the codes of one call over the whole clip: True" in printed
    assert re.search(r"encode: median [\d.]+ ms a frame", printed) and "decode: median" in printed
    decoded, rate = soundfile.read(speech.with_name("decoded.wav"))
    assert (len(decoded), rate) == (26 * 1920, 24_000)


def test_stream_file_from_a_microphone(run, tmp_path, monkeypatch):
    """With a fake sounddevice module: there is no microphone where tests run."""

    class InputStream:
        def __init__(self, samplerate, channels, dtype, blocksize):
            assert (samplerate, channels, dtype, blocksize) == (24_000, 1, "float32", 1920)
            self.draw = np.random.default_rng(0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, frames):
            return self.draw.normal(0, 0.1, (frames, 1)).astype(np.float32), False

    stand_in = types.ModuleType("sounddevice")
    stand_in.InputStream = InputStream
    monkeypatch.setitem(sys.modules, "sounddevice", stand_in)
    printed = run("stream_file.py", "--microphone", "0.4", "decoded.wav")
    assert "5 frames; the codes of one call over the whole clip: True" in printed
    assert soundfile.info(tmp_path / "decoded.wav").frames == 5 * 1920


@pytest.mark.slow
def test_stream_onnx(run, speech, tmp_path):
    """What it writes is the model's audio, in 16 bits."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = fastmimi.load("demo", num_codebooks=8)
    fastmimi.export_model(model, tmp_path / "exported", check=False)
    clip, rate = soundfile.read(speech, dtype="float32")
    soundfile.write(speech, soxr.resample(clip, rate, 24_000), 24_000, subtype="PCM_16")
    run("stream_onnx.py", "exported", speech.name, "decoded.wav")
    heard, _ = soundfile.read(speech, dtype="float32")
    want = model.decode(model.encode(torch.from_numpy(heard)[None, None]))[0, 0].numpy()
    decoded, rate = soundfile.read(tmp_path / "decoded.wav", dtype="float32")
    assert rate == 24_000 and np.abs(decoded - want.clip(-1, 1)).max() < 1e-4


def test_stream_pool(run):
    printed = run("stream_pool.py", "--capacity", "2", "--clients", "4")
    assert "4 of 4 clients got the codes of their clip encoded alone" in printed
    assert printed.count("joins in slot") == printed.count("leaves slot") == 4


@pytest.mark.slow
def test_ray_serve(run):
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    assert "3 of 3 streams got the codes" in run("ray_serve.py", "--replicas", "2", "--streams", "3")


@pytest.mark.slow
def test_fine_tune(run, speech, tmp_path):
    printed = run("fine_tune.py", speech.name, "--steps", "2", "--batch", "1")
    assert "step 2: mel distance" in printed and "codes unchanged: True" in printed
    before, after = fastmimi.load("demo"), fastmimi.load(tmp_path / "tuned")
    then = dict(before.named_parameters())
    changed = {name.partition(".")[0] for name, now in after.named_parameters() if not torch.equal(now, then[name])}
    assert changed == {"upsample", "decoder_transformer", "decoder"}


def test_tokenize_folder(run, speech, tmp_path):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "corpus" / "reader"
    folder.mkdir(parents=True)
    speech.rename(folder / "a.wav")
    (folder / "b.wav").write_text("no audio")
    printed = run("tokenize_folder.py", "corpus", "codes")
    assert "reader/a.wav: 2.03 s, 8 x 26 codes, which begin [" in printed
    assert "1 files, 2.0 s of audio" in printed and "skipped:" in printed and "b.wav" in printed
    written = tmp_path / "codes" / "shard-00000.parquet"
    before = written.stat().st_mtime_ns
    assert "0 files" in run("tokenize_folder.py", "corpus", "codes")
    assert written.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}[{cell['id']}]", "exec"), names)
    from matplotlib import pyplot

    assert len(pyplot.get_fignums()) == 3
    pyplot.close("all")
    assert len(list(tmp_path.glob("*.wav"))) == 4


def test_the_notebook_has_format_4_5_and_no_outputs():
    """The requirements of nbformat's schema, checked without nbformat."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"]) for cell in cells)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
        assert all(isinstance(line, str) for line in cell["source"])
        assert not code or (cell["execution_count"] is None and cell["outputs"] == [])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_is_short_and_documents_its_command(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    assert f"python examples/{path.name}" in source.split('"""')[1]
