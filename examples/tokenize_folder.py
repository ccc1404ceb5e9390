"""Turn a folder of audio files into tables of codes and look at them; run again, it goes on where it was stopped.

    python examples/tokenize_folder.py speech codes                       # every audio file below speech/
    python examples/tokenize_folder.py speech codes --model kyutai/mimi --codebooks 8

Each audio file of any format, rate and channel count becomes a row of a Parquet file in codes/, with the codes that
`encode` of it alone gives. Files that cannot be read are listed with the reason. `fastmimi tokenize` is the same as a
command; docs/corpus.md has the sources, the columns and the options. Needs pip install 'fastmimi[corpus]'.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

import fastmimi
from fastmimi.corpus.shards import ERRORS, shard_files, unpack_codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of audio files, read recursively")
    parser.add_argument("target", type=Path, help="a folder for the tables of codes")
    parser.add_argument("--model", default="demo", help="demo, a directory, a .safetensors file or a hub id")
    parser.add_argument("--codebooks", type=int, default=8)
    args = parser.parse_args()
    done = fastmimi.tokenize(args.source, args.target, model=args.model, num_codebooks=args.codebooks)
    for path in shard_files(args.target):
        table = pq.read_table(path, columns=["id", "codes", "duration"])
        for name, codes, duration in zip(
            table["id"].to_pylist(), unpack_codes(table["codes"]), table["duration"].to_pylist(), strict=True
        ):
            print(f"{name}: {duration:.2f} s, {codes.shape[0]} x {codes.shape[1]} codes, which begin {codes[:, 0]}")
    for error in pq.read_table(args.target / ERRORS)["error"].to_pylist():
        print(f"skipped: {error}")
    print(f"{done.rows} files, {done.seconds:.1f} s of audio, {done.speed:.1f} times real time")


if __name__ == "__main__":
    main()
