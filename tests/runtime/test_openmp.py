"""Worker threads of OpenMP: a thread that leaves computing to another ends its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
COUNT = """
import os, threading, time, torch
from fastmimi.runtime.openmp import end_workers
torch.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
def settles_at(most):
    end = time.monotonic() + 10  # a thread that was joined may be listed for a moment
    while threads() > most and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() <= most, (threads(), most)
def compute():
    torch.ones(1 << 20).add_(1)
def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
"""


def run(code):
    subprocess.run([sys.executable, "-c", COUNT + code], check=True, timeout=120)


def test_workers_end_and_come_back():
    run(
        "before = threads(); compute(); assert threads() == before + 2, threads()\n"
        "end_workers(); settles_at(before)\n"
        "compute(); assert threads() == before + 2, threads()\n"
    )


def test_workers_of_other_threads_stay():
    run("compute(); n = threads(); in_thread(end_workers); settles_at(n); assert threads() == n, threads()\n")


def test_without_workers_nothing_happens():
    run("before = threads(); end_workers(); end_workers(); assert threads() == before, threads()\n")


def test_a_pool_leaves_computing_to_its_thread():
    """Loading, recording and resets use workers of the calling thread, messages of the server none."""
    run(
        "import fastmimi\n"
        "from fastmimi.serve.pool import StreamPool\n"
        "from fastmimi.serve import formats, protocol\n"
        "compute(); end_workers(); before = threads()\n"
        "pool = StreamPool(fastmimi.load('demo'), 2); assert threads() > before\n"
        "pool.start()\n"
        "stream = pool.open('encode')\n"
        "settles_at(before + 1)  # the pool's\n"
        "protocol.samples_to_bytes(torch.randn(1, 9600), 's16'); stream.push_audio(torch.randn(1000))\n"
        "formats.Incoming('s16', 24_000, pool.codec).samples(bytes(1 << 18)); assert threads() == before + 1\n"
        "stream.push_audio(torch.randn(3 * 24_000))\n"
        "while stream.waiting('encode'): time.sleep(0.01)\n"
        "settles_at(before + 3)  # the pool's and its workers\n"
        "stream.close(); settles_at(before + 3)\n"
        "pool.stop()\n"
    )
