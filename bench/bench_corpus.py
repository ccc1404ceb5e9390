"""A corpus of utterances of 2 to 15 s: `fastmimi.tokenize` beside loops over single files, and beside computing alone.

    python -m pytest bench/bench_corpus.py --benchmark-only

The files are cut from the package's clip, in formats and rates in turn. `compute` encodes what is in memory already, in
the batches and threads of `tokenize`. The last benchmark has no audio: the bookkeeping of manifests of two sizes.
"""

from pathlib import Path

import numpy as np
import peers
import pyarrow as pa
import pytest
import soundfile
import soxr
import torch

import fastmimi
from fastmimi.corpus import local, manifest, plan, reading, sources

UTTERANCES, ROUNDS = 16, 2
CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"
FORMATS = (("flac", 16_000), ("wav", 24_000), ("mp3", 44_100), ("ogg", 22_050), ("flac", 48_000))


def write_utterances(folder, count):
    """Utterances of 2 to 15 s, evenly drawn."""
    folder.mkdir()
    clip, rate = soundfile.read(CLIP, dtype="float32")
    draw = np.random.default_rng(0)
    for i in range(count):
        suffix, to = FORMATS[i % len(FORMATS)]
        length = int(draw.uniform(2, 15) * rate)
        cut = np.resize(np.roll(clip, -int(draw.integers(len(clip)))), length)
        soundfile.write(folder / f"{i:04}.{suffix}", soxr.resample(cut, rate, to).clip(-1, 1), to)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "speech"
    write_utterances(folder, UTTERANCES)
    return folder


def bench_tokenize(benchmark, in_turn, mimi, folder, speech, tmp_path):
    rows = manifest.rows_of(sources.table_of(speech))
    signals = [reading.samples(row, mimi.sample_rate) for row in rows]
    lengths = np.array([len(signal) for signal in signals])
    limits = local.Limits.of(mimi, None, 512)
    batches = [*plan.batches(lengths, range(len(rows)), limits.batch)]
    transformers, runs = peers.load("transformers", folder), iter(range(1000))

    def tokenize():
        return fastmimi.tokenize(speech, tmp_path / str(next(runs)), model=mimi, progress=False).rows

    def compute():
        with local.Workers(mimi, len(batches)) as workers:
            some = [workers.submit(local.encoded, mimi, [signals[i] for i in b.rows], limits.batch) for b in batches]
            return sum(len(found.result()) for found in some)

    def loop(encode):
        def run():
            with torch.inference_mode():
                for row in rows:
                    encode(torch.from_numpy(reading.samples(row, mimi.sample_rate).T)[None])
            return len(rows)

        return run

    calls = {"fastmimi": tokenize, "compute": compute, "loop": loop(mimi.encode)}
    if transformers is not None:
        calls["transformers"] = loop(transformers.encode)
    tokenize()
    seconds = lengths.sum() / mimi.sample_rate
    results = in_turn(f"{len(rows)} utterances, {seconds:.0f} s of audio", calls, ROUNDS)
    assert set(results.values()) == {len(rows)}
    if benchmark.stats is not None:
        assert benchmark.extra_info["ratios"]["compute"] > 0.85, "reading and writing cost more than 15%"
        assert benchmark.extra_info["ratios"]["loop"] > 0.9, "a loop over single files is more than a tenth faster"


def bench_bookkeeping_is_linear(benchmark, in_turn, mimi):
    """Planning a manifest of a hundred thousand rows, and of a million: the digest, and every batch of every shard."""

    def plan_of(count):
        durations = np.random.default_rng(0).uniform(1, 20, count)
        ids = pa.array(np.char.add("speech/", np.arange(count).astype(str)))
        table = manifest.checked(pa.table({"id": ids, "uri": ids, "duration": durations}), "the benchmark")

        def run():
            manifest.digest(table)
            lengths = plan.lengths(table["duration"].to_numpy(), mimi.sample_rate)
            found = 0
            for start in range(0, count, 1000):
                rows = manifest.rows_of(table.slice(start, 1000))
                batches = plan.batches(lengths, range(start, start + len(rows)), 60 * mimi.sample_rate)
                found += sum(len(batch.rows) for batch in batches)
            return found

        return run

    calls = {"fastmimi": plan_of(100_000), "a million rows": plan_of(1_000_000)}
    results = in_turn("planning 100,000 rows", calls, ROUNDS)
    assert results == {"fastmimi": 100_000, "a million rows": 1_000_000}
    if benchmark.stats is not None:
        assert benchmark.extra_info["ratios"]["a million rows"] < 15, "planning is not linear"
