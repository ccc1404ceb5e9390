"""Processes that read audio, so that reading, resampling and decoding overlap with computing, and may crash.

A reader is `python -c` with this module, not multiprocessing: a caller's script needs no `if __name__ == "__main__"`,
a reader starts without PyTorch, and it ends when its parent does, however that ended. Parent and reader exchange
pickles through its standard input and output: a request (rows, rate, channels) is answered, for each row, by its
blocks, float32 [samples, channels], and then None, or the sentence of an error, or an OSError of the machine.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

import numpy as np

from ..errors import InputError
from . import reading
from .rows import Row

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from fastmimi.corpus.reader import main; main()"
AHEAD = 8  # blocks of a long file that wait to be computed
ENDED = (EOFError, BrokenPipeError, pickle.UnpicklingError)  # what the end of the process looks like
CRASHED = "made the process that reads it end: the file crashes its decoder, or the machine is out of memory"


class Reader:
    """A process that reads rows, for one thread at a time, until `end`."""

    def __init__(self, rate: int, channels: int):
        self._rate, self._channels = rate, channels
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def read(self, rows: Sequence[Row]) -> list[np.ndarray | str]:
        """Each row's samples, [n, channels], or the sentence that says why there are none.

        A row that ends the process costs no other its samples. Raises OSError for an error of the machine.
        """
        try:
            self._request(rows)
            return [self._whole() for _ in rows]
        except ENDED:
            self.close()
        except BaseException:
            self.close()
            raise
        if len(rows) == 1:
            return [f"{rows[0].uri} {CRASHED}"]
        return [found for row in rows for found in self.read([row])]

    def blocks(self, row: Row) -> Iterator[np.ndarray]:
        """A long row's blocks, read ahead. Raises InputError if it cannot be read to its end."""
        waiting: Queue[Any] = Queue(AHEAD)
        thread = Thread(target=self._forward, args=(row, waiting), daemon=True)
        thread.start()
        try:
            while isinstance(found := waiting.get(), np.ndarray):
                yield found
            if isinstance(found, OSError):
                raise found
            if found is not None:
                raise InputError(found)
        except BaseException:
            self.close()  # which ends the thread once it can hand on what it has
            while thread.is_alive():
                with suppress(Empty):
                    waiting.get(timeout=0.01)
            raise

    def _forward(self, row: Row, waiting: Queue[Any]) -> None:
        try:
            self._request([row])
            while isinstance(found := self._receive(), np.ndarray):
                waiting.put(found)
        except (*ENDED, ValueError):  # the last: `close` has closed the pipe
            found = f"{row.uri} {CRASHED}"
        waiting.put(found)

    def _request(self, rows: Sequence[Row]) -> None:
        if self._ended:
            raise RuntimeError("the reader has ended")
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None
        _send((list(rows), self._rate, self._channels), self._process.stdin)

    def _receive(self) -> Any:
        process = self._process
        if process is None:
            raise EOFError
        assert process.stdout is not None
        return pickle.load(process.stdout)

    def _whole(self) -> np.ndarray | str:
        blocks = []
        while isinstance(found := self._receive(), np.ndarray):
            blocks.append(found)
        if isinstance(found, OSError):
            raise found
        return np.concatenate(blocks) if found is None else found

    def end(self) -> None:
        """End for good, from any thread: who reads at the moment gets an error."""
        self._ended = True
        self.close()

    def close(self) -> None:
        """End the process; a later call starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()


def _send(message: object, to: IO[bytes]) -> None:
    pickle.dump(message, to, protocol=5)
    to.flush()


def main() -> None:
    """The reader's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    requests = sys.stdin.buffer
    try:
        while True:
            rows, rate, channels = pickle.load(requests)
            for row in rows:
                _answer(row, rate, channels, answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _answer(row: Row, rate: int, channels: int, to: IO[bytes]) -> None:
    end: Any = None
    try:
        for block in reading.blocks(row, rate, channels):
            _send(block, to)
    except InputError as error:
        end = str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        end = OSError(error.errno, error.strerror, error.filename)
    _send(end, to)
