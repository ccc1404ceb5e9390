"""Drop-in for rustymimi: numpy arrays in and out, a thin wrapper around `fastmimi.Mimi` and `StreamState`.

`from fastmimi.compat import rustymimi` replaces `import rustymimi`. As there, the default is 8 codebooks, codes are
uint32 and audio is float32, and everything runs on the CPU. Up to 10 s, codes are identical to rustymimi's and audio
equals rustymimi's up to fp32 rounding. An incomplete last frame is padded in each layer, as in rustymimi and
transformers; audio without samples is encoded as a single silent sample. Intended differences:

- Every position attends to 250 positions, itself and the 249 before it, as in moshi and transformers. In rustymimi it
  attends to 251, offline and in streams, so that beyond 10 s a few codes and the audio differ slightly.
- `reset` clears the whole state. rustymimi keeps the last latents before the downsampling, so that its first frame
  after a reset differs.
- `encode` and `decode` do not affect the streams of `encode_step` and `decode_step`. In rustymimi, what they process
  stays in the attention's cache of those streams.
- The length of the input is not limited: `max_seq_len` is checked and otherwise ignored. rustymimi raises ValueError
  once an object has encoded, or decoded, more than `max_seq_len` positions (25 per second) in total, clips and streams
  together and across resets; the default of 8192 is 5.5 minutes.
- `StreamTokenizer.decode` takes any number of frames [T, K], where rustymimi takes one.
- An error in a worker thread is raised by the `get_` call that would have returned the result, and the stream continues
  as if the failed input had not been passed. rustymimi prints the error, and no result ever follows.
- Codes must have exactly `num_codebooks` rows. With one codebook, rustymimi's `decode` accepts more rows and reads only
  the first.
- Arrays need not be contiguous, decoding no frames gives no samples (rustymimi panics), "bf16" works, and NaN or
  infinite samples raise InputError.
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

import numpy as np
import torch

from ..checkpoints.weights import load
from ..errors import InputError
from ..runtime.state import StreamState

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Tokenizer:
    """The codec, with one batch of streams in each direction.

    Args:
        path: a `.safetensors` file in Kyutai's layout, or any other source that `fastmimi.load` takes.
        num_codebooks: K, the number of codebooks that `encode` yields and `decode` takes.
        dtype: "f32", "f16" or "bf16", the precision that it computes in; codebooks and the search in them stay fp32.
        max_seq_len: ignored.

    Raises InputError if there is nothing at `path`, if the file holds no Mimi with that many codebooks, and for another
    dtype. The methods raise TypeError for arrays of another dtype or rank, and InputError for invalid shapes or values.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, num_codebooks: int = 8, dtype: str = "f32",
        max_seq_len: int | None = None,
    ):  # fmt: skip
        if dtype not in DTYPES:
            raise InputError(f"dtype must be {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        if max_seq_len is not None and operator.index(max_seq_len) < 1:
            raise InputError(f"max_seq_len must be a positive integer or None, got {max_seq_len}")
        self._mimi = load(Path(path), dtype=DTYPES[dtype], num_codebooks=operator.index(num_codebooks))
        self.reset()

    def reset(self) -> None:
        """Restart the streams in both directions; the next chunk sets their batch size."""
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
        """The streams' next chunk [B, 1, N] float32 -> codes [B, K, T] uint32 of the frames it completes, or None."""
        _check("pcm_data", pcm_data, np.float32, 3, "[batch, 1, samples]")
        if self._encoding is None:
            self._encoding = self._mimi.new_state(len(pcm_data))
            self._mimi.warm_up(self._encoding)
        codes = self._mimi.encode(_tensor(pcm_data), state=self._encoding)
        return _codes_out(codes) if codes.shape[-1] else None

    def decode_step(self, codes: np.ndarray) -> np.ndarray | None:
        """The streams' next codes [B, K, T] uint32 -> audio [B, 1, 1920 * T] float32, or None if T is 0."""
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
    """One stream in each direction, each on its own thread.

    `encode` and `decode` queue input and return at once; `get_encoded` and `get_decoded` return results, in the order
    of the input, one for each call that completes a frame. The arguments are those of `Tokenizer`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, num_codebooks: int = 8, dtype: str = "f32",
        max_seq_len: int | None = None,
    ):  # fmt: skip
        tokenizer = Tokenizer(path, num_codebooks=num_codebooks, dtype=dtype, max_seq_len=max_seq_len)
        self._codebooks = num_codebooks
        self._encoder = Worker("fastmimi-encode", tokenizer.encode_step)
        self._decoder = Worker("fastmimi-decode", tokenizer.decode_step)
        # The threads refer to the tokenizer, not to this object, so that they end when it is deleted or Python exits.
        weakref.finalize(self, stop, self._encoder, self._decoder)

    def encode(self, pcm_data: np.ndarray) -> None:
        """Queue the next samples [N] float32 at 24 kHz. Raises TypeError for another dtype or rank."""
        _check("pcm_data", pcm_data, np.float32, 1, "[samples]")
        self._encoder.inbox.put(pcm_data[None, None].copy())

    def decode(self, codes: np.ndarray) -> None:
        """Queue the codes of the next frames [T, K] uint32.

        Raises TypeError for another dtype or rank, InputError for another number of codebooks.
        """
        _check("codes", codes, np.uint32, 2, f"[frames, {self._codebooks}]")
        if codes.shape[1] != self._codebooks:
            raise InputError(f"codes must be [frames, {self._codebooks}], got {codes.shape}")
        self._decoder.inbox.put(codes.T[None].copy())

    def get_encoded(self) -> np.ndarray | None:
        """The next codes [K, T] uint32, or None if none are ready; raises the worker thread's error, if any."""
        codes = self._encoder.get()
        return None if codes is None else codes[0]

    def get_decoded(self) -> np.ndarray | None:
        """The next audio [1920 * T] float32, or None if none is ready; raises the worker thread's error, if any."""
        audio = self._decoder.get()
        return None if audio is None else audio[0, 0]


Step = Callable[[np.ndarray], np.ndarray | None]


class Worker:
    """A daemon thread that calls `step` on each item of `inbox` and queues its results, unless None, and its errors."""

    def __init__(self, name: str, step: Step):
        # SimpleQueue is reentrant, so that a finalizer may use it even while it interrupts another call of the queue
        self.inbox: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self.outbox: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()
        self.thread = Thread(target=_work, args=(step, self.inbox, self.outbox), name=name, daemon=True)
        self.thread.start()

    def get(self) -> np.ndarray | None:
        """The next result, or None if none is ready; an error is raised when it is next."""
        try:
            result = self.outbox.get_nowait()
        except Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return result


def _work(step: Step, inbox: SimpleQueue[np.ndarray | None], outbox: SimpleQueue[np.ndarray | BaseException]) -> None:
    while (item := inbox.get()) is not None:
        try:
            result: np.ndarray | BaseException | None = step(item)
        except BaseException as error:
            result = error
        if result is not None:
            outbox.put(result)


def stop(*workers: Worker) -> None:
    """End the threads after the step that they are running; queued input is discarded."""
    for worker in workers:
        with suppress(Empty):
            while True:
                worker.inbox.get_nowait()
        worker.inbox.put(None)
    for worker in workers:
        if worker.thread is not current_thread():  # a finalizer may run on any thread
            worker.thread.join()


def write_wav(filename: str | os.PathLike[str], data: np.ndarray, sample_rate: int) -> None:
    """Write mono audio [N] float32 as 16-bit PCM at `sample_rate` Hz; samples are clipped to [-1, 1], NaN becomes 0.

    Raises TypeError for another dtype or rank, InputError for an invalid sample rate and if the file cannot be written.
    """
    _check("data", data, np.float32, 1, "[samples]")
    if not 0 < operator.index(sample_rate) < 2**31:
        raise InputError(f"sample_rate must be a positive number of Hz, got {sample_rate}")
    pcm = (np.nan_to_num(np.clip(data, -1, 1)) * np.float32(32767)).astype("<i2")  # rounds towards 0, as rustymimi
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
    return torch.from_numpy(x.copy())  # a copy, since x may be read-only, which tensors cannot be


def _codes_out(codes: torch.Tensor) -> np.ndarray:
    return codes.numpy().astype(np.uint32)


def _audio_out(audio: torch.Tensor) -> np.ndarray:
    return audio.float().numpy()
