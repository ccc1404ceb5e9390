"""Stream a file, or the microphone, through the codec frame by frame, and report the latency of each frame.

    python examples/stream_file.py                            # the speech clip that comes with the package
    python examples/stream_file.py speech.wav decoded.wav     # any file that libsndfile reads
    python examples/stream_file.py --microphone 5 out.wav     # 5 seconds; needs `pip install sounddevice`

It shows an explicit StreamState, `warm_up` before the first frame, `flush` for the last partial frame, and that the
stream gives what one call over the whole clip gives. A frame is 80 ms of audio, so a codec keeps up with live audio
where encoding and decoding a frame take less than 80 ms.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import soundfile
import torch

import fastmimi
from fastmimi.io.audio import probe, read_blocks
from fastmimi.io.transcode import rechunk

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"


def microphone(seconds: float, rate: int, frame_size: int) -> Iterator[np.ndarray]:
    """Chunks [frame_size, 1] float32 as they are recorded."""
    import sounddevice

    with sounddevice.InputStream(samplerate=rate, channels=1, dtype="float32", blocksize=frame_size) as stream:
        for _ in range(round(seconds * rate / frame_size)):
            chunk, overflowed = stream.read(frame_size)
            if overflowed:
                print("the codec fell behind: the microphone lost samples")
            yield chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="audio to read (not with --microphone), audio to write")
    parser.add_argument("--model", default="demo", help="demo, a directory, a .safetensors file or a hub id")
    parser.add_argument("--microphone", type=float, metavar="SECONDS", help="record instead of reading a file")
    args = parser.parse_args()
    mimi = fastmimi.load(args.model)
    if args.microphone:
        chunks, outputs = microphone(args.microphone, mimi.sample_rate, mimi.frame_size), args.files
    else:
        source, outputs = (args.files or [CLIP])[0], args.files[1:]
        chunks = rechunk(read_blocks(probe(source), mimi.sample_rate), mimi.frame_size)  # [1920, 1], the last shorter

    state = mimi.new_state(batch_size=1)
    mimi.warm_up(state)  # packs weights and records the step now, so that the first frame does not wait for it
    heard, codes, decoded, times = [], [], [], []
    with torch.inference_mode():
        for chunk in chunks:
            audio = torch.from_numpy(np.ascontiguousarray(chunk.T))[None]  # [1, 1, samples]
            start = perf_counter()
            frame = mimi.encode(audio, state=state)  # [1, K, 1]; [1, K, 0] where the chunk fills no frame
            encoded = perf_counter()
            decoded.append(mimi.decode(frame, state=state))  # [1, 1, 1920]
            times.append((encoded - start, perf_counter() - encoded))
            heard.append(audio)
            codes.append(frame)
        codes.append(mimi.flush(state))  # what did not fill a frame, completed with zeros
        decoded.append(mimi.decode(codes[-1], state=state))
        streamed, whole = torch.cat(codes, dim=-1), mimi.encode(torch.cat(heard, dim=-1))
    print(f"{streamed.shape[-1]} frames; the codes of one call over the whole clip: {torch.equal(streamed, whole)}")
    for name, column in zip(("encode", "decode"), np.array(times).T * 1000, strict=True):
        median, late, slowest = np.percentile(column, (50, 99, 100))
        print(f"{name}: median {median:.1f} ms a frame, 99th percentile {late:.1f} ms, slowest {slowest:.1f} ms")
    if outputs:
        soundfile.write(outputs[0], torch.cat(decoded, dim=-1)[0, 0].numpy(), mimi.sample_rate)


if __name__ == "__main__":
    main()
