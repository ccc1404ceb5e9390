"""Many streams with one model: a pool that clients join and leave at any moment, with chunks of any length.

    python examples/stream_pool.py --capacity 4 --clients 10

At each turn clients push what their microphones have recorded, and a tick of the pool encodes what is complete. At the
end each client's codes are compared with those of its clip encoded alone. `fastmimi serve` adds the network.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

import fastmimi
from fastmimi.serve.slots import PoolFull
from fastmimi.serve.stream import Stream

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"


@dataclass(eq=False)
class Client:
    """What a connection would hold: its audio [N], how much of it was sent, and the codes [K, T] that came back."""

    name: int
    audio: torch.Tensor
    stream: Stream | None = None
    sent: int = 0
    codes: list[torch.Tensor] = field(default_factory=list)

    def talk(self, length: int) -> None:
        """Send the next samples, and at the end say so."""
        if self.sent >= len(self.audio):
            return
        self.stream.push_audio(self.audio[self.sent : self.sent + length])
        self.sent += length
        if self.sent >= len(self.audio):
            self.stream.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=4, help="streams at the same time")
    parser.add_argument("--clients", type=int, default=8, help="streams in all")
    args = parser.parse_args()
    mimi, draw = fastmimi.load("demo"), np.random.default_rng(0)
    audio, rate = soundfile.read(CLIP, dtype="float32")
    audio = torch.from_numpy(soxr.resample(audio, rate, mimi.sample_rate))
    bounds = zip(draw.integers(0, 200_000, args.clients), draw.integers(8_000, 40_000, args.clients), strict=True)
    clients = [Client(i, audio[start : start + length]) for i, (start, length) in enumerate(bounds)]
    pool = fastmimi.StreamPool(mimi, args.capacity, directions=("encode",))
    waiting, talking = list(clients), []
    while waiting or talking:
        try:
            while waiting:
                waiting[0].stream = pool.open()
                print(f"tick {pool.stats().ticks:3}: client {waiting[0].name} joins in slot {waiting[0].stream.slot}")
                talking.append(waiting.pop(0))
        except PoolFull:
            pass  # perhaps next time
        for client in talking:
            client.talk(int(draw.integers(0, 4_000)))  # up to 167 ms
        pool.step()
        for client in talking:
            client.codes.append(client.stream.read_codes())  # to be sent on
        for client in [client for client in talking if client.stream.done]:
            print(f"tick {pool.stats().ticks:3}: client {client.name} leaves slot {client.stream.slot}")
            talking.remove(client)
    whole = [mimi.encode(client.audio[None, None])[0] for client in clients]
    equal = sum(torch.equal(torch.cat(client.codes, dim=-1), whole[client.name]) for client in clients)
    print(f"{equal} of {len(clients)} clients got the codes of their clip encoded alone")


if __name__ == "__main__":
    main()
