"""Servers on several machines, or GPUs, with Ray Serve: replicas of `fastmimi serve` behind one address.

    pip install 'fastmimi[serve]' 'ray[serve]'
    python examples/ray_serve.py --replicas 2

Each replica has its own pool. Ray's proxy keeps a WebSocket on the replica where it began, so a stream never moves. On
a cluster, `ray.init(address="auto")`, and give each replica a GPU with `ray_actor_options={"num_gpus": 1}`. This script
starts Ray on this machine, sends a clip through each of several streams at once, and stops.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import soundfile
import soxr
import torch
from ray import serve

import fastmimi

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"


def replica():
    """The routes of a server, made in each replica."""
    from fastmimi.serve.app import Service, Settings

    torch.set_num_threads(1)
    pool = fastmimi.StreamPool(fastmimi.load("demo"), capacity=8)
    return Service(pool, Settings(model="demo")).app()


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(replica)
class Codec:
    """The routes are all that a replica has."""


def stream(audio: torch.Tensor) -> torch.Tensor:
    """The codes [8, T] of audio [N], through one stream."""
    client = fastmimi.Client("http://127.0.0.1:8000")
    with client.stream(("encode",), num_codebooks=8) as stream:
        for chunk in audio.split(1920):
            stream.send_audio(chunk)
        stream.flush()
        return stream.read_until_flushed().codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=4)
    args = parser.parse_args()
    audio, rate = soundfile.read(CLIP, dtype="float32")
    audio = torch.from_numpy(soxr.resample(audio, rate, 24_000))
    ray.init(num_cpus=args.replicas)
    serve.run(Codec.options(num_replicas=args.replicas).bind())
    with ThreadPoolExecutor(args.streams) as threads:
        results = list(threads.map(stream, [audio[i * 1000 :] for i in range(args.streams)]))
    serve.shutdown()
    ray.shutdown()
    mimi = fastmimi.load("demo", num_codebooks=8)
    equal = sum(torch.equal(c, mimi.encode(audio[None, None, i * 1000 :])[0]) for i, c in enumerate(results))
    print(f"{equal} of {args.streams} streams got the codes of their clip encoded alone")


if __name__ == "__main__":
    main()
