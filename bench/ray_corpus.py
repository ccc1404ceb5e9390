"""Seconds of `fastmimi tokenize` with the local engine and with Ray on this machine, each run in a process of its own.

    python bench/ray_corpus.py [--utterances 400] [--rows-per-shard 25] [--rounds 2] [--ray "--actors 2 --cpus 1"]

A corpus of one utterance measures the time to start. The tables of the two engines must be equal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import bench_corpus
import pyarrow.parquet as pq


def tokenize(speech: Path, out: Path, *options: str) -> float:
    """Seconds of a whole run, with the start of Python."""
    command = [sys.executable, "-m", "fastmimi", "tokenize", str(speech), str(out), "--model", "random:0"]
    begin = perf_counter()
    subprocess.run([*command, "--codebooks", "8", "--quiet", *options], check=True, capture_output=True)
    return perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=400)
    parser.add_argument("--rows-per-shard", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ray", default="", help="options of the Ray engine")
    args = parser.parse_args()
    engines = {"local": [], "ray": ["--engine", "ray", *args.ray.split()]}
    with tempfile.TemporaryDirectory() as name:
        for count in (1, args.utterances):
            speech = Path(name) / f"{count} utterances"
            bench_corpus.write_utterances(speech, count)
            for i in range(args.rounds):
                outs = {engine: Path(name) / f"{count}-{engine}-{i}" for engine in engines}
                for engine, options in engines.items():
                    seconds = tokenize(speech, outs[engine], "--rows-per-shard", str(args.rows_per_shard), *options)
                    print(f"{speech.name}, {engine}: {seconds:.1f} s", flush=True)
                tables = [[pq.read_table(p) for p in sorted(out.glob("shard-*.parquet"))] for out in outs.values()]
                assert tables[0] and tables[0] == tables[1], "the engines differ"


if __name__ == "__main__":
    main()
