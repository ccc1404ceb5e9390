"""Rows are read whatever they name; a process that reads may crash, print, or be stopped, and costs one row at most."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastmimi.corpus import reader as readers
from fastmimi.corpus import reading
from fastmimi.corpus.reader import Reader
from fastmimi.corpus.rows import Row
from fastmimi.errors import InputError

RATE = 24_000
SHADOW = """
import importlib, os, sys
here = os.path.dirname(__file__)
sys.path.remove(here)
del sys.modules["soundfile"]
real = importlib.import_module("soundfile")
start = real.SoundFile.__init__
def init(self, file, *args, **options):
    print("libraries print")
    if "fatal" in str(file):
        os._exit(9)
    start(self, file, *args, **options)
real.SoundFile.__init__ = init
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In readers that start from here on, a decoder that ends the process at files named fatal."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "soundfile.py").write_text(SHADOW)
    monkeypatch.syspath_prepend(tmp_path / "shadow")


def wav(path: Path, seed: int = 0, length: int = 5000, rate: int = RATE) -> np.ndarray:
    samples = np.random.default_rng(seed).integers(-9000, 9000, length).astype(np.float32) / 32_768
    soundfile.write(path, samples, rate)
    return samples


def test_sections_and_their_rounding(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    samples = wav(path, length=RATE)
    for row, expected in [
        (Row("a", str(path)), samples),
        (Row("a", f"file://{path}"), samples),
        (Row("a", str(path), 0.1, 0.2), samples[2400:4800]),
        (Row("a", str(path), 0.5, 1.009), samples[12_000:]),  # 9 ms more than there are
        (Row("a", str(path), 0.9999999), samples[24_000:]),
    ]:
        if len(expected):
            assert np.array_equal(reading.samples(row, RATE)[:, 0], expected)
        else:
            with pytest.raises(InputError, match="was asked for"):
                reading.samples(row, RATE)
    with pytest.raises(InputError, match=r"a\.wav has 1 s, and 0 s to 1.02 s was asked for"):
        reading.samples(Row("a", str(path), 0, 1.02), RATE)


def test_errors_of_the_machine_are_not_those_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav(tmp_path / "a.wav")

    def fail(number: int) -> Callable[..., None]:
        def probe(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        return probe

    monkeypatch.setattr(reading, "probe", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        reading.samples(Row("a", str(tmp_path / "a.wav")), RATE)
    monkeypatch.setattr(reading, "probe", fail(errno.EIO))
    with pytest.raises(InputError, match=r"a\.wav cannot be read \(.*Input/output error"):
        reading.samples(Row("a", str(tmp_path / "a.wav")), RATE)


def test_a_reader_answers_for_each_row(tmp_path: Path) -> None:
    samples = [wav(tmp_path / f"{i}.wav", i, 40_000 * (i + 1), 16_000) for i in range(3)]
    rows = [Row(str(i), str(tmp_path / f"{i}.wav")) for i in range(4)]
    reader = Reader(RATE, 1)
    try:
        for _ in range(2):
            found = reader.read(rows)
            assert [np.array_equal(got, reading.samples(row, RATE)) for got, row in zip(found, rows[:3], strict=False)]
            assert [len(got) for got in found[:3]] == [len(x) * 3 // 2 for x in samples]
            assert found[3] == f"{rows[3].uri} does not exist"
        assert np.array_equal(np.concatenate([*reader.blocks(rows[2])]), found[2])
        with pytest.raises(InputError, match="does not exist"):
            next(reader.blocks(rows[3]))
        blocks = reader.blocks(rows[2])
        next(blocks)
        blocks.close()  # a caller that stops early
        assert isinstance(reader.read(rows[:1])[0], np.ndarray)
    finally:
        reader.end()
    with pytest.raises(RuntimeError, match="has ended"):
        reader.read(rows)


@pytest.mark.usefixtures("crashing")
def test_a_crash_costs_one_row(tmp_path: Path) -> None:
    for name in ("a", "fatal", "b"):
        wav(tmp_path / f"{name}.wav")
    rows = [Row(name, str(tmp_path / f"{name}.wav")) for name in ("a", "fatal", "b")]
    reader = Reader(RATE, 1)
    try:
        a, crash, b = reader.read(rows)
        assert isinstance(a, np.ndarray) and np.array_equal(a, b)
        assert isinstance(crash, str) and crash.startswith(f"{rows[1].uri} made the process that reads it end")
        with pytest.raises(InputError, match="made the process that reads it end"):
            next(reader.blocks(rows[1]))
        assert len([*reader.blocks(rows[0])]) == 1
    finally:
        reader.end()


def test_a_reader_ends_with_its_parent(tmp_path: Path) -> None:
    code = "\n".join([
        "import os, sys",
        "from fastmimi.corpus.reader import Reader",
        "from fastmimi.corpus.rows import Row",
        "reader = Reader(24000, 1)",
        "reader.read([Row('a', '/absent.wav')])",
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules",
        "print(reader._process.pid, flush=True)",
        "os.kill(os.getpid(), 9)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-9, "")
    for _ in range(10_000):  # the output that both held is closed, so it is ending
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            break
        stat = Path(f"/proc/{int(done.stdout)}/stat")
        if stat.exists() and stat.read_text().split()[2] == "Z":
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("the reader is still there")


def test_a_reader_does_not_load_pytorch() -> None:
    code = f"import sys; import {readers.__name__}; assert not {{'torch', 'pyarrow', 'pydantic'}} & {{*sys.modules}}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize(
    "name, samples, sentence",
    [
        ("nan.wav", [0.0, np.nan, 0.0], "audio must be finite: {} holds nan at sample 1 (0.000 s)"),
        ("zero.wav", [], "{} holds no samples"),
        ("short.wav", [0.1], None),
    ],
)
def test_what_a_file_holds(tmp_path: Path, name: str, samples: list[float], sentence: str | None) -> None:
    path = tmp_path / name
    soundfile.write(path, np.array(samples, np.float32), RATE, subtype="FLOAT")
    row = Row("a", str(path))
    if sentence is None:
        assert reading.samples(row, RATE).tolist() == np.array(samples, np.float32)[:, None].tolist()
    else:
        with pytest.raises(InputError) as caught:
            reading.samples(row, RATE)
        assert str(caught.value) == sentence.format(path)


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    samples = wav(tmp_path / "a.wav")
    path.write_bytes((tmp_path / "a.wav").read_bytes())
    assert np.array_equal(reading.samples(Row("a", str(path)), RATE)[:, 0], samples)
    with pytest.raises(InputError, match="is not a file"):
        reading.samples(Row("a", str(tmp_path)), RATE)
