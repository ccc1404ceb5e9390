"""By hand: a run over 500 files is killed at 20 random moments, and its tables are compared with those of a whole run.

    python tests/corpus/kills.py                                      # about five minutes
    python tests/corpus/kills.py --engine ray --kills 8   # the driver is killed, with Ray installed

The files are cut from the package's clip, in several formats, rates and channel counts; some are corrupt.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import pyarrow.parquet as pq
import soundfile
import soxr

import fastmimi
from fastmimi.devtools import kill
from fastmimi.devtools.testing import small_model

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"
RATES, SUFFIXES = (8_000, 16_000, 22_050, 24_000, 44_100, 48_000), ("wav", "flac", "ogg", "mp3", "aiff", "opus")


def write_files(folder: Path, count: int, draw: np.random.Generator) -> None:
    clip, rate = soundfile.read(CLIP, dtype="float32")
    for i in range(count):
        suffix = SUFFIXES[i % len(SUFFIXES)]
        to = 48_000 if suffix == "opus" else int(draw.choice(RATES))
        start = int(draw.integers(0, len(clip) // 2))
        cut = soxr.resample(clip[start : start + int(draw.uniform(0.1, 8) * rate)], rate, to)
        cut = np.stack([cut, cut[::-1]], 1) if i % 7 == 0 else cut
        path = folder / f"{i % 10}" / f"{i:04}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(path, "w", to, cut.ndim, format="OGG" if suffix == "opus" else None,
                                 subtype="OPUS" if suffix == "opus" else None) as file:  # fmt: skip
            file.write(cut.clip(-1, 1))
        if i % 25 == 3:  # truncated, empty, of noise
            content = path.read_bytes()
            path.write_bytes([content[: len(content) // 2], b"", bytes(draw.integers(0, 256, 3000, np.uint8))][i % 3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="of the killed run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder / "speech", args.files, np.random.default_rng(args.seed))
        fastmimi.save_pretrained(small_model(), folder / "model")
        common = ["--model", str(folder / "model"), "--rows-per-shard", "10", "--quiet"]
        begin = perf_counter()
        tables = {}
        for out, kills in ((folder / "whole", 0), (folder / "killed", args.kills)):
            command = ["-m", "fastmimi", "tokenize", str(folder / "speech"), str(out), *common]
            most_s = 3.0
            if kills and args.engine == "ray":
                command, most_s = [*command, "--engine", "ray"], 12.0  # Ray takes a few to start
            codes = kill.until_it_ends(
                command, kills=kills, began=(out / "settings.json").exists, most_s=most_s, seed=args.seed
            )
            print(f"{out.name}: exit codes {codes}, {perf_counter() - begin:.0f} s", flush=True)
            tables[out.name] = {str(p.relative_to(out)): pq.read_table(p) for p in sorted(out.rglob("*.parquet"))}
            assert not [*out.rglob("*.part")]
        whole, killed = tables["whole"], tables["killed"]
        assert whole.keys() == killed.keys(), whole.keys() ^ killed.keys()
        for path, table in whole.items():
            assert table.equals(killed[path]), path
        rows = sum(table.num_rows for path, table in whole.items() if path.startswith("shard-"))
        print(f"{rows} rows, {whole['errors.parquet'].num_rows} errors, {len(whole) - 2} tables: all equal")
        readers = [p for p in psutil.process_iter(["cmdline"]) if "corpus.reader" in " ".join(p.info["cmdline"] or [])]
        assert not readers, f"readers that outlived their parents: {readers}"


if __name__ == "__main__":
    main()
