"""`python tests/serve/soak.py --minutes 30`: clients come, stay and vanish in random ways, and nothing may grow.

Runs a server in a process of its own (Linux). Every 30 s: its resident memory, open slots, frames. At the end all slots
must be free, and memory may have grown by 5 % and 20 MB since the second minute; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode

from fastmimi.serve.client import AsyncClient, Client, ServerError
from fastmimi.serve.protocol import Audio, Codes, pack

SLOTS, CLIENTS = 12, 20  # some are refused
STAY_S, REPORT_S, SETTLED_S = 8.0, 30.0, 120.0
SPEECH = Path(__file__).resolve().parents[2] / "fastmimi" / "assets" / "198-209-0000.ogg"
SERVER = f"""
import sys
import fastmimi
from fastmimi.devtools.testing import small_model
from fastmimi.serve import server
from fastmimi.serve.app import Settings
from fastmimi.serve.connection import ConnectionLimits
from fastmimi.serve.pool import StreamPool
codec = small_model() if sys.argv[1] == "small" else fastmimi.load(sys.argv[1])
limits = ConnectionLimits(idle_s=5, send_s=2, stalled_s=5)
settings = Settings(model=sys.argv[1], connection=limits)
server.run(StreamPool(codec, {SLOTS}), settings, server.listen("127.0.0.1", int(sys.argv[2])))
"""


class Churn:
    """Clients of a server, each of which does one thing after another until `end`."""

    def __init__(self, url: str, end: float):
        self.url, self.end, self.done = url, end, Counter[str]()
        self.noise = np.random.default_rng(0)

    async def client(self) -> None:
        while time.monotonic() < self.end:
            way = random.choices([self.talk, self.vanish, self.say_nonsense, self.never_read, self.flood, self.file],
                                 [8, 6, 2, 1, 1, 1])[0]  # fmt: skip
            try:
                await asyncio.wait_for(way(), 60)
                self.done[way.__name__] += 1
            except ServerError as error:
                self.done[str(error.code)] += 1
            except (OSError, WebSocketException, asyncio.TimeoutError) as error:
                self.done[type(error).__name__] += 1
            await asyncio.sleep(random.uniform(0, 0.5))

    def stream(self, directions=("encode", "decode")):
        rate, kind = random.choice([(None, "f32"), (None, "s16"), (16_000, "s16"), (48_000, "f32")])
        return AsyncClient(self.url).stream(directions, num_codebooks=random.choice([None, 1, 4]), sample_rate=rate,
                                            format=kind)  # fmt: skip

    async def talk(self, leave: bool = True) -> None:
        """Duplex, in real time or faster, with flushes and resets; without `leave` the client just stops."""
        async with self.stream() as stream:
            echo = asyncio.create_task(self.echo(stream))
            try:
                pace, stay = random.choice([1.0, 3.0]), time.monotonic() + random.uniform(0.1, STAY_S)
                while time.monotonic() < stay and not echo.done():
                    seconds = random.uniform(0.01, 0.3)
                    await stream.send_audio(self.noise.uniform(-0.3, 0.3, int(seconds * stream.ready.sample_rate)))
                    if random.random() < 0.05:
                        await (stream.flush() if random.random() < 0.5 else stream.reset())
                    await asyncio.sleep(seconds / pace)
                if not leave:
                    self.break_off(stream)
            finally:
                echo.cancel()
                ended = await asyncio.gather(echo, return_exceptions=True)
            if leave and isinstance(ended[0], Exception):
                raise ended[0]

    @staticmethod
    async def echo(stream) -> None:
        async for results in stream:
            if results.codes.shape[-1]:
                await stream.send_codes(results.codes)

    @staticmethod
    def break_off(stream) -> None:
        """The end of TCP, perhaps in the middle of a message."""
        transport = stream._socket.transport
        if random.random() < 0.5:
            frame = Frame(Opcode.BINARY, pack(Audio(bytes(40_000)))).serialize(mask=True)
            transport.write(frame[: random.randrange(len(frame))])
        transport.abort()

    async def vanish(self) -> None:
        await self.talk(leave=False)

    async def say_nonsense(self) -> None:
        async with self.stream() as stream:
            while True:
                await stream._socket.send(os.urandom(random.randrange(200)))
                await asyncio.sleep(0)

    async def never_read(self) -> None:
        """Send codes, whose audio is much, and take nothing."""
        async with self.stream(("decode",)) as stream:
            stream._socket.transport.pause_reading()
            codes = pack(Codes(bytes(2 * 8 * 4), 4))
            for _ in range(2000):
                await asyncio.wait_for(stream._socket.send(codes), 5)
            stream._socket.transport.abort()

    async def flood(self) -> None:
        async with self.stream() as stream:
            message = pack(Audio(bytes(8 * random.randrange(40))))
            for _ in range(3000):
                await asyncio.wait_for(stream._socket.send(message), 5)
            stream._socket.transport.abort()

    async def file(self) -> None:
        client = Client(self.url)
        tokens = await asyncio.to_thread(client.encode, SPEECH, 4)
        await asyncio.to_thread(client.decode, tokens)


def resident_mb(process: subprocess.Popen) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def health(url: str) -> dict:
    return json.loads(await asyncio.to_thread(Client(url).health))


async def soak(process: subprocess.Popen, url: str, minutes: float) -> bool:
    begin = time.monotonic()
    while True:
        try:
            await health(url)
            break
        except OSError:
            if process.poll() is not None or time.monotonic() - begin > 120:
                raise SystemExit("the server does not start") from None
            await asyncio.sleep(0.2)
    begin = time.monotonic()
    churn = Churn(url, begin + 60 * minutes)
    clients = [asyncio.create_task(churn.client()) for _ in range(CLIENTS)]
    settled_mb = None
    while time.monotonic() < churn.end:
        await asyncio.sleep(min(REPORT_S, max(0.0, churn.end - time.monotonic())))
        seconds, stats = time.monotonic() - begin, await health(url)
        if settled_mb is None and seconds >= min(SETTLED_S, 30 * minutes):
            settled_mb = resident_mb(process)
        print(
            f"{seconds:6.0f} s  {resident_mb(process):7.1f} MB  {stats['open']:3} of {stats['capacity']} slots  "
            f"{stats['encoded_frames']:,} frames encoded, {stats['decoded_frames']:,} decoded", flush=True,
        )  # fmt: skip
    await asyncio.gather(*clients)
    end = time.monotonic() + 20
    while (stats := await health(url))["free"] < SLOTS and time.monotonic() < end:
        await asyncio.sleep(0.2)
    final_mb, most_mb = resident_mb(process), 1.05 * settled_mb + 20
    print(", ".join(f"{count} x {name}" for name, count in churn.done.most_common()))
    print(f"free slots: {stats['free']} of {SLOTS}, quarantined: {stats['quarantined']}, "
          f"failed streams: {stats['failed_streams']}")  # fmt: skip
    print(f"resident: {settled_mb:.1f} MB, then {final_mb:.1f} MB, at most {most_mb:.1f} MB may be")
    wrong = stats["failed_streams"] + churn.done["bad_message"] + churn.done["failed"]  # of clients that did no wrong
    return stats["free"] == SLOTS and not wrong and final_mb <= most_mb


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="small", help="small (random weights), or a model as for `fastmimi`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVER, options.model, str(port)])
    try:
        passed = asyncio.run(soak(process, f"http://127.0.0.1:{port}", options.minutes))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    print(f"the server's exit code: {code}")
    print("passed" if passed and code == 0 else "failed")
    return 0 if passed and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
