"""Plots: waveforms and spectrograms of audio before and after coding, the codes in between, and codebook usage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECONDS = 30.0  # of longer audio, only the beginning is drawn
RANGE_DB = 80.0  # dynamic range of the spectrograms, below the loudest point
WINDOW = 0.032  # length of the spectrogram's window, in seconds
COLUMNS = 1500  # maximum number of columns of a spectrogram
BANDS = 192  # rows of a spectrogram, equally spaced on the mel scale
TICKS = (250, 500, 1000, 2000, 4000, 8000)  # Hz
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#4a5568"


@dataclass
class Track:
    """Records the first `limit` samples of audio while its blocks pass through `tee`."""

    limit: int
    total: int = 0  # samples that have passed through
    _kept: list[np.ndarray] = field(default_factory=list)

    def tee(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the blocks [n, channels] unchanged and record them."""
        for block in blocks:
            if self.total < self.limit:
                self._kept.append(block[: self.limit - self.total].mean(axis=1))
            self.total += len(block)
            yield block

    @property
    def audio(self) -> np.ndarray:
        """The recorded samples, the mean of the channels: [n] float32."""
        return np.concatenate(self._kept) if self._kept else np.zeros(0, np.float32)


def check(path: Path) -> str:
    """The plot's format, from the suffix of `path`.

    Raises InputError if matplotlib is missing or cannot write that format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise InputError("plots need matplotlib: pip install 'fastmimi[plot]'") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise InputError(
            f"cannot draw {path}: its suffix must be one of {', '.join(sorted(kinds))}, got {path.suffix!r}"
        )
    return kind


def draw(
    path: Path, kind: str, codes: np.ndarray, tracks: dict[str, np.ndarray], *, sample_rate: int, frame_size: int,
    codebook_size: int, title: str,
) -> None:  # fmt: skip
    """Draw waveform and spectrogram of each track above the codes, on one time axis, and write the plot.

    Args:
        path: the file to write.
        kind: its format, as returned by `check`.
        codes: [K, T].
        tracks: names ("original", "decoded") to mono audio [n] at `sample_rate`, drawn in this order.
        sample_rate: in Hz.
        frame_size: samples per frame of codes.
        codebook_size: entries per codebook, the range of the codes' colours.
        title: of the whole plot. If the audio is longer than `SECONDS`, only its beginning is drawn, and the title
            says so.
    """
    seconds = codes.shape[1] * frame_size / sample_rate
    if seconds > SECONDS:
        title += f" (the first {SECONDS:g} of {seconds:.1f} s)"
    drawn_seconds = min(seconds, SECONDS)
    tracks = {name: audio[: round(drawn_seconds * sample_rate)] for name, audio in tracks.items()}
    codes = codes[:, : -(-round(drawn_seconds * sample_rate) // frame_size)]
    code_height = min(2.6, 0.9 + 0.06 * len(codes))
    heights = [*(h for _ in tracks for h in (0.8, 1.7)), code_height]
    figure = new_figure(12, 0.9 + sum(heights) * 1.15)
    figure.suptitle(title, fontsize=11, color=GREY)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    peak = max((float(np.abs(audio).max(initial=0)) for audio in tracks.values()), default=0.0)
    images = {name: spectrogram(audio, sample_rate) for name, audio in tracks.items()}
    loudest = max((float(image.max()) for image in images.values()), default=0.0)
    for row, (name, audio) in enumerate(tracks.items()):
        colour = ORANGE if row else BLUE
        _waveform(grid[2 * row], name, audio, sample_rate, peak or 1.0, colour)
        _spectrogram(figure, grid[2 * row + 1], images[name], len(audio) / sample_rate, sample_rate, loudest)
    _codes(figure, grid[-1], codes, frame_size / sample_rate, codebook_size)
    grid[-1].set_xlabel("time (s)")
    grid[-1].set_xlim(0, drawn_seconds)
    figure.savefig(path, format=kind)


def draw_usage(
    path: Path, used: list[float], perplexity: list[float], durations: np.ndarray | None = None, kind: str = "png"
) -> None:
    """Write bar charts over the codebooks: the share of entries used [K] and the perplexity [K].

    With `durations` in seconds, a histogram of them stands beside these. `kind` is the format, as from `check`.
    """
    charts = 2 if durations is None else 3
    figure = new_figure(5 * charts, 4)
    left, right, *rest = figure.subplots(1, charts)
    levels = range(1, len(used) + 1)
    for axes, values, title, colour in ((left, used, "share of entries used", BLUE),
                                        (right, perplexity, "perplexity", ORANGE)):  # fmt: skip
        axes.bar(levels, values, color=colour)
        _label(axes, title, colour, "codebook")
    for axes in rest:
        axes.hist(durations, bins=50, color=GREY)
        _label(axes, "utterances", GREY, "duration (s)")
    figure.savefig(path, format=kind)


def _label(axes: Axes, title: str, colour: str, horizontal: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=colour)
    axes.set_xlabel(horizontal)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """An empty figure, in inches, that is drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def spectrogram(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mono audio [n] -> spectrogram [BANDS, columns] in dB; rows are equally spaced in mel from 0 Hz to Nyquist."""
    size = round(WINDOW * sample_rate)
    hop = max(size // 4, -(-len(audio) // COLUMNS))
    padded = np.pad(audio.astype(np.float64), (size // 2, size // 2 + hop))
    starts = range(0, len(padded) - size, hop)
    window = np.hanning(size) / np.hanning(size).sum() * 2  # so that a sine of amplitude 1 is 0 dB
    frames = np.stack([padded[start : start + size] * window for start in starts])
    power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2  # [columns, size + 1]
    hz = _hz(np.linspace(0, _mel(sample_rate / 2), BANDS))
    position = hz / sample_rate * 2 * size
    below = np.floor(position).astype(int).clip(0, size - 1)
    mixed = power[:, below] + (position - below) * (power[:, below + 1] - power[:, below])
    return 10 * np.log10(mixed.T + 1e-14)


def _waveform(axes: Axes, name: str, audio: np.ndarray, rate: int, peak: float, colour: str) -> None:
    """In about 3000 columns, the range between minimum and maximum and, in a darker shade, the RMS level."""
    hop = max(1, len(audio) // 3000)
    columns = np.pad(audio, (0, -len(audio) % hop), mode="edge" if len(audio) else "constant").reshape(-1, hop)
    time = (np.arange(len(columns)) + 0.5) * hop / rate
    level = np.sqrt((columns.astype(np.float64) ** 2).mean(axis=1))
    axes.fill_between(time, columns.min(axis=1), columns.max(axis=1), color=colour, alpha=0.45, linewidth=0.6)
    axes.fill_between(time, -level, level, color=colour, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.4)
    axes.set_ylim(-1.05 * peak, 1.05 * peak)
    axes.set_ylabel("amplitude")
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=colour)
    axes.spines[["top", "right"]].set_visible(False)


def _spectrogram(figure: Figure, axes: Axes, image: np.ndarray, seconds: float, rate: int, loudest: float) -> None:
    picture = axes.imshow(
        image, extent=(0, seconds, 0, _mel(rate / 2)), vmin=loudest - RANGE_DB, vmax=loudest, **_IMAGE, cmap="magma"
    )
    ticks = [tick for tick in TICKS if tick < 0.9 * rate / 2]
    axes.set_yticks([_mel(tick) for tick in ticks], [f"{tick / 1000:g}" for tick in ticks])
    axes.set_ylabel("frequency (kHz)")
    figure.colorbar(picture, ax=axes, label="dB", pad=0.01, fraction=0.03, aspect=18)


def _codes(figure: Figure, axes: Axes, codes: np.ndarray, frame_seconds: float, size: int) -> None:
    count, frames = codes.shape
    picture = axes.imshow(
        codes, extent=(0, frames * frame_seconds, 0.5, count + 0.5), vmin=0, vmax=size - 1, **_IMAGE, cmap="viridis"
    )
    axes.set_yticks(sorted({1, *range(8, count + 1, 8), count} if count > 8 else range(1, count + 1)))
    axes.invert_yaxis()
    axes.set_ylabel("codebook")
    axes.set_title("codes", loc="left", fontsize=10, fontweight="bold", color=GREY)
    figure.colorbar(picture, ax=axes, label="entry", pad=0.01, fraction=0.03, aspect=18)


_IMAGE: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def _hz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)
