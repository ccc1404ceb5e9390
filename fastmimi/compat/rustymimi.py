"""rustymimi's interface to Mimi: numpy arrays in and out, thin over `fastmimi.Mimi` and `StreamState`.

`from fastmimi.compat import rustymimi` takes the place of `import rustymimi`: eight codebooks by default, codes
uint32, audio float32, on the CPU. Up to 10 s codes are rustymimi's, and audio is to fp32 rounding. An incomplete last
frame is completed layer by layer, as there (and in transformers); no samples at all give the frame of one silent
sample. What differs, on purpose:

- Every position attends to itself and the 249 before it, as in moshi and transformers; in rustymimi it sees 251,
  offline and streaming, so that beyond 10 s a few codes differ and the audio a little.
- `reset` starts over entirely; rustymimi keeps the last latents before the downsampling, and its first frame after a
  reset is another one. `encode` and `decode` leave the streams of the steps alone; there they end up in their
  attention.
- There is no longest input: `max_seq_len` is checked and has no effect. rustymimi raises ValueError once an object has
  encoded, or decoded, more than that many positions, 25 per second: by default 8192, or 5.5 minutes. Clips and streams
  count alike, and `reset` does not start the count anew.
- `StreamTokenizer.decode` takes any number of frames [T, K], rustymimi one. What a worker thread fails of is raised by
  the `get_` call that would have had its result, and the stream goes on as if it had not been given; rustymimi
  prints it, and who waits for the result waits forever.
- Codes have as many rows as there are codebooks; with one, rustymimi's `decode` takes more and reads the first.
- Arrays need not be contiguous, no frames decode to no samples (there a panic), "bf16" works, and samples that are
  NaN or infinite raise InputError.
"""

from __future__ import annotations

import operator
import os
import wave
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any

import numpy as np
import torch

from ..checkpoints.weights import load
from ..errors import InputError
from ..runtime.state import StreamState

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Tokenizer:
    """The codec and one batch of streams.

    Args:
        path: a `.safetensors` file in Kyutai's layout, or any other source that `fastmimi.load` takes.
        num_codebooks: K, how many of the file's codebooks `encode` yields and `decode` takes.
        dtype: "f32", "f16" or "bf16", what it computes in; codebooks and their search stay fp32.
        max_seq_len: without effect.

    Raises InputError for a path or dtype that there is not, and for a file that holds no Mimi of so many codebooks.
    Its methods raise TypeError for arrays of another dtype or rank, InputError for what is in them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_codebooks: int = 8,
        dtype: str = "f32",
        max_seq_len: int | None = None,
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype must be {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        if max_seq_len is not None and operator.index(max_seq_len) < 1:
            raise InputError(f"max_seq_len must be a positive integer or None, got {max_seq_len}")
        self._mimi = load(Path(path), dtype=DTYPES[dtype], num_codebooks=operator.index(num_codebooks))
        self.reset()

    def reset(self) -> None:
        """Begin both streams anew; the next chunk says how many rows they have."""
        self._encoding: StreamState | None = None
        self._decoding: StreamState | None = None

    def encode(self, pcm_data: np.ndarray) -> np.ndarray:
        """Audio [B, 1, N] float32 at 24 kHz -> codes [B, K, max(1, ceil(N / 1920))] uint32."""
        _check("pcm_data", pcm_data, np.float32, 3, "[batch, 1, samples]")
        if pcm_data.shape[-1] == 0:
            pcm_data = np.zeros((*pcm_data.shape[:2], 1), np.float32)
        return _codes_out(self._mimi.encode(_tensor(pcm_data), last_frame="layers"))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [B, K, T] uint32 -> audio [B, 1, 1920 * T] float32."""
        return _audio_out(self._mimi.decode(self._codes_in(codes)))

    def encode_step(self, pcm_data: np.ndarray) -> np.ndarray | None:
        """The next samples [B, 1, N] float32 of the streams -> codes [B, K, T] of the frames they complete, or None."""
        _check("pcm_data", pcm_data, np.float32, 3, "[batch, 1, samples]")
        if self._encoding is None:
            self._encoding = self._mimi.new_state(len(pcm_data))
            self._mimi.warm_up(self._encoding)
        codes = self._mimi.encode(_tensor(pcm_data), state=self._encoding)
        return _codes_out(codes) if codes.shape[-1] else None

    def decode_step(self, codes: np.ndarray) -> np.ndarray | None:
        """The next codes [B, K, T] uint32 of the streams -> audio [B, 1, 1920 * T] float32, or None for no frames."""
        frames = self._codes_in(codes)
        if self._decoding is None:
            self._decoding = self._mimi.new_state(len(frames))
            self._mimi.warm_up(self._decoding)
        audio = self._mimi.decode(frames, state=self._decoding)
        return _audio_out(audio) if audio.shape[-1] else None

    def _codes_in(self, codes: np.ndarray) -> torch.Tensor:
        count = self._mimi.num_codebooks
        _check("codes", codes, np.uint32, 3, f"[batch, {count}, frames]")
        if codes.shape[1] != count:
            raise InputError(f"codes must be [batch, {count}, frames], got {codes.shape}")
        return _tensor(codes.astype(np.int64))


class StreamTokenizer:
    """One stream in each direction, each on a thread of its own: give with `encode` and `decode`, ask with `get_`.

    Results come in the order of what was given, one for each call that completes a frame. Arguments as for `Tokenizer`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_codebooks: int = 8,
        dtype: str = "f32",
        max_seq_len: int | None = None,
    ):
        tokenizer = Tokenizer(path, num_codebooks=num_codebooks, dtype=dtype, max_seq_len=max_seq_len)
        self._codebooks = num_codebooks
        self._encoder = Worker("fastmimi-encode", tokenizer.encode_step)
        self._decoder = Worker("fastmimi-decode", tokenizer.decode_step)
        # The threads know the tokenizer and not this object, so that dropping it, or leaving Python, ends them.
        weakref.finalize(self, stop, self._encoder, self._decoder)

    def encode(self, pcm_data: np.ndarray) -> None:
        """Give the next samples [N] float32 at 24 kHz. Raises TypeError for another dtype or rank."""
        _check("pcm_data", pcm_data, np.float32, 1, "[samples]")
        self._encoder.inbox.put(pcm_data[None, None].copy())

    def decode(self, codes: np.ndarray) -> None:
        """Give the codes of the next frames [T, K] uint32. Raises TypeError or InputError for other arrays."""
        _check("codes", codes, np.uint32, 2, f"[frames, {self._codebooks}]")
        if codes.shape[1] != self._codebooks:
            raise InputError(f"codes must be [frames, {self._codebooks}], got {codes.shape}")
        self._decoder.inbox.put(codes.T[None].copy())

    def get_encoded(self) -> np.ndarray | None:
        """The next codes [K, T] uint32, or None while there are none; raises what the worker failed of."""
        codes = self._encoder.get()
        return None if codes is None else codes[0]

    def get_decoded(self) -> np.ndarray | None:
        """The next audio [1920 * T] float32, or None while there is none; raises what the worker failed of."""
        audio = self._decoder.get()
        return None if audio is None else audio[0, 0]


class Worker:
    """A daemon thread that takes from `inbox`, calls `step`, and puts what that gives or raises, if not None."""

    def __init__(self, name: str, step: Callable[[Any], Any]):
        # SimpleQueue may be used from finalizers, which can interrupt any other of its calls
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.outbox: SimpleQueue[Any] = SimpleQueue()
        self.thread = Thread(target=_work, args=(step, self.inbox, self.outbox), name=name, daemon=True)
        self.thread.start()

    def get(self) -> Any:
        """The next result, None without one; raises a failure in its turn."""
        try:
            result = self.outbox.get_nowait()
        except Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return result


def _work(step: Callable[[Any], Any], inbox: SimpleQueue[Any], outbox: SimpleQueue[Any]) -> None:
    while (item := inbox.get()) is not None:
        try:
            result = step(item)
        except BaseException as error:
            result = error
        if result is not None:
            outbox.put(result)


def stop(*workers: Worker) -> None:
    """End the threads after the step they are at; what else was given is dropped."""
    for worker in workers:
        with suppress(Empty):
            while True:
                worker.inbox.get_nowait()
        worker.inbox.put(None)
    for worker in workers:
        if worker.thread is not current_thread():  # a finalizer may run anywhere
            worker.thread.join()


def write_wav(filename: str | os.PathLike[str], data: np.ndarray, sample_rate: int) -> None:
    """Write mono audio [N] float32 as 16-bit PCM at `sample_rate` Hz; clipped to [-1, 1], NaN is 0.

    Raises TypeError for another dtype or rank, InputError for a rate that there is not or a file it cannot write.
    """
    _check("data", data, np.float32, 1, "[samples]")
    if not 0 < operator.index(sample_rate) < 2**31:
        raise InputError(f"sample_rate must be a positive number of Hz, got {sample_rate}")
    pcm = (np.nan_to_num(np.clip(data, -1, 1)) * np.float32(32767)).astype("<i2")  # towards 0, as there
    try:
        with open(filename, "wb") as file, wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(sample_rate)
            out.writeframes(pcm.tobytes())
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(filename)!r}: {error.strerror}") from error


def _check(name: str, x: np.ndarray, dtype: type[np.generic], rank: int, shape: str) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != dtype or x.ndim != rank:
        got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{name} must be a numpy array of {np.dtype(dtype)} {shape}, got {got}")


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.copy())  # x may be read-only, which torch does not know


def _codes_out(codes: torch.Tensor) -> np.ndarray:
    return codes.numpy().astype(np.uint32)


def _audio_out(audio: torch.Tensor) -> np.ndarray:
    return audio.float().numpy()
