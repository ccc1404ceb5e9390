"""Serve many streams with one model: a StreamState with a row for each, which clients join and leave at any frame.

    python examples/batch_server_loop.py --slots 4 --clients 10

This is the loop of a server without its network: a tick encodes and decodes one frame (80 ms) of every client in one
batch. A client that joins takes a free slot, whose row is reset; `exec_mask` leaves out rows without a client and rows
whose audio is late. At the end each client's codes are compared with those of its clip encoded alone.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import soundfile
import soxr
import torch

import fastmimi

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"


@dataclass(eq=False)
class Client:
    """What a connection would hold: its audio in frames [1, 1920], and the codes [K, 1] of each that was sent."""

    frames: tuple[torch.Tensor, ...]
    codes: list[torch.Tensor] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=4, help="streams that are served at the same time")
    parser.add_argument("--clients", type=int, default=8, help="streams in all")
    parser.add_argument("--late", type=float, default=0.1, help="how often a client's frame does not arrive in time")
    args = parser.parse_args()
    mimi, draw = fastmimi.load("demo"), np.random.default_rng(0)
    size = mimi.frame_size
    audio, rate = soundfile.read(CLIP, dtype="float32")
    audio = torch.from_numpy(soxr.resample(audio, rate, mimi.sample_rate))[None]  # [1, samples]
    clients = []
    for start in draw.integers(0, 99_000, args.clients):
        clip = audio[:, start : start + size * int(draw.integers(5, 20))]  # 0.4 to 1.5 s
        clients.append(Client(clip.split(size, dim=-1)))
    state = mimi.new_state(batch_size=args.slots)
    mimi.warm_up(state)
    state.exec_mask = torch.zeros(args.slots, dtype=torch.bool)  # no slot is taken yet
    waiting, slots, times = list(clients), [None] * args.slots, []
    while waiting or any(slots):
        for slot, client in enumerate(slots):
            if client is None and waiting:
                slots[slot] = waiting.pop(0)
                state.reset(torch.arange(args.slots) == slot)  # this row alone starts a new stream
                print(f"tick {len(times):3}: client {clients.index(slots[slot])} joins in slot {slot}")
        arrived = [client is not None and draw.random() >= args.late for client in slots]
        state.exec_mask = torch.tensor(arrived)
        batch = torch.zeros(args.slots, 1, size)  # rows that sit this tick out are not read
        for slot in np.flatnonzero(arrived):
            batch[slot] = slots[slot].frames[len(slots[slot].codes)]
        begin = perf_counter()
        codes = mimi.encode(batch, state=state)  # [slots, K, 1]; -1 where a row sits out
        mimi.decode(codes, state=state)  # [slots, 1, 1920], to be sent on; 0 where a row sits out
        times.append(perf_counter() - begin)
        for slot in np.flatnonzero(arrived):
            client = slots[slot]
            client.codes.append(codes[slot])
            if len(client.codes) == len(client.frames):
                slots[slot] = None
                print(f"tick {len(times):3}: client {clients.index(client)} leaves slot {slot}")
    whole = [mimi.encode(torch.cat(client.frames, dim=-1)[None])[0] for client in clients]
    equal = sum(torch.equal(torch.cat(client.codes, dim=-1), whole[i]) for i, client in enumerate(clients))
    print(f"{equal} of {len(clients)} clients got the codes of their clip encoded alone")
    print(f"{args.slots} slots: median {np.median(times) * 1000:.1f} ms a tick, slowest {max(times) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
