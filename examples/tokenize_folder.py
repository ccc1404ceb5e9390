"""Turn a folder of audio files into token files, with progress; run again, it goes on where it was stopped.

    python examples/tokenize_folder.py speech tokens                       # every audio file below speech/
    python examples/tokenize_folder.py speech tokens --model kyutai/mimi --codebooks 8

Each audio file of any format, rate and channel count becomes a bit-packed token file (.safetensors) under the same
relative path, which `fastmimi decode` reads. Audio is encoded through a stream, so that memory does not grow with a
file's length. A file is written whole or not at all; one that cannot be read is named and skipped.
"""

import argparse
from pathlib import Path
from time import perf_counter

from rich.progress import track

import fastmimi
from fastmimi.checkpoints.weights import fingerprint
from fastmimi.io.audio import files_below, probe, read_blocks
from fastmimi.io.tokens import Tokens
from fastmimi.io.transcode import Clock, encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of audio files, read recursively")
    parser.add_argument("target", type=Path, help="a folder for the token files")
    parser.add_argument("--model", default="demo", help="demo, a directory, a .safetensors file or a hub id")
    parser.add_argument("--codebooks", type=int, default=8)
    args = parser.parse_args()
    mimi = fastmimi.load(args.model, num_codebooks=args.codebooks)
    of_the_model = {
        "codebook_size": mimi.config.codebook_size,
        "sample_rate": mimi.sample_rate,
        "frame_rate": mimi.frame_rate,
        "frame_size": mimi.frame_size,
        "fingerprint": fingerprint(mimi),  # decoding with another quantizer is an error, not noise
        "model": args.model,
    }
    begin, seconds, done, failed = perf_counter(), 0.0, 0, []
    for path in track(files_below(args.source), description="encoding"):
        target = args.target / path.relative_to(args.source).with_suffix(path.suffix + ".safetensors")
        if target.exists():
            continue
        try:
            file = probe(path)
            codes = encode(mimi, read_blocks(file, mimi.sample_rate), Clock())  # [K, T]
        except fastmimi.InputError as error:
            failed.append(error)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        Tokens(codes, length=file.length_at(mimi.sample_rate), packed=True, **of_the_model).save(target)
        seconds, done = seconds + file.duration, done + 1
    for error in failed:
        print(f"skipped: {error}")
    taken = perf_counter() - begin
    print(f"{done} files, {seconds:.1f} s of audio in {taken:.1f} s: {seconds / taken:.1f} times real time")


if __name__ == "__main__":
    main()
