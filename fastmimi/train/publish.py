"""Publish a model that was trained in one or more consecutive runs: small weights and a record of the training.

    fastmimi evaluate held-out --model out/demo_finish/model --codebooks 8 --codebooks 16 --json evaluation.json
    python -m fastmimi.train.publish out/demo out/demo_finish fastmimi/assets/demo --evaluation evaluation.json

writes config.json, model.safetensors (fp16, or with `--int8` int8 and scales; `fastmimi.load` converts to fp32 by
default), training.json (configuration, final losses and machine of each run) and training.png (training curves). The
weights are those of the last run. The evaluation is copied beside them; `fastmimi roundtrip --model demo` shows it for
a clip that it names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from ..checkpoints.int8 import quantize
from ..checkpoints.weights import load, write_safetensors
from ..errors import InputError
from ..io import plot
from ..io.files import check_input, replacing
from ..models.codec import Codec
from ..models.config import MimiCodecConfig
from .config import AUDIO_LOSSES, TrainConfig

CURVES = (*AUDIO_LOSSES, "discriminator", "cosine", "commitment", "explained", "used")
SMOOTHED_POINTS = 50  # of a smoothed curve in the picture


def publish(
    runs: Sequence[Path],
    target: Path,
    int8: bool = False,
    evaluation: Path | None = None,
    earlier: Path | None = None,
) -> None:
    """Write the averaged codec of the last run, and the record of all runs, to the folder `target`.

    `evaluation` is the JSON of `fastmimi evaluate`. Without it, one of earlier weights in the folder is removed.
    `earlier` is the training.json of the model that the first run loaded: its runs come first in the record.
    """
    measured = None if evaluation is None else check_input(evaluation).read_text()
    before = [] if earlier is None else json.loads(check_input(earlier).read_text())
    plot.check(target / "training.png")
    for run in runs:
        if not (run / "model").is_dir():
            raise InputError(f"{run} is not a training run with a checkpoint: it has no folder `model`")
    codec, configs = load(runs[-1] / "model"), [TrainConfig.read(run / "config.yaml") for run in runs]
    if not isinstance(codec.config, MimiCodecConfig):
        raise InputError(f"only a Mimi can be published, and {runs[-1]} trained a {type(codec).__name__}")
    curves = [read_curves(run) for run in runs]
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / "config.json") as part:
        part.write_text(json.dumps(codec.config.to_dict(), indent=2) + "\n")
    write_safetensors(small_state(codec, int8), target / "model.safetensors")
    with replacing(target / "training.json") as part:
        machines = [json.loads((run / "machine.json").read_text()) for run in runs]
        summaries = [summary(*run) for run in zip(configs, curves, machines, strict=True)]
        part.write_text(json.dumps(before + summaries, indent=1) + "\n")
    (target / "evaluation.json").unlink(missing_ok=True)
    if measured is not None:
        with replacing(target / "evaluation.json") as part:
            part.write_text(measured)
    with replacing(target / "training.png") as part:
        draw(part, concatenate_curves(curves))


def small_state(codec: Codec, int8: bool) -> dict[str, torch.Tensor]:
    """The state dict in fp16. Each codebook entry is stored as `embed_sum`, with a `cluster_usage` of 1.

    With `int8`, codebooks, with a scale for each entry, and weights, with one for each output channel, are int8.
    """
    state, channels = dict(codec.state_dict()), {}
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        prefix = _name_of(codec, part)
        for level, entries in enumerate(part.codebooks()):
            state[f"{prefix}.layers.{level}.codebook.embed_sum"] = entries
            state[f"{prefix}.layers.{level}.codebook.cluster_usage"] = torch.ones(len(entries))
            channels[f"{prefix}.layers.{level}.codebook.embed_sum"] = 0
    for name, module in codec.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            # of a grouped transposed convolution, the output channels are not one dimension
            channels[f"{name}.weight"] = int(isinstance(module, nn.ConvTranspose1d) and module.groups == 1)
    return quantize(state, channels if int8 else {})


def _name_of(codec: Codec, module: nn.Module) -> str:
    return next(name for name, other in codec.named_modules() if other is module)


Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, values, seconds since 1970


def read_curves(run: Path) -> dict[str, Curve]:
    """All scalars that a run logged, by name. Raises InputError if there are none."""
    from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run / "log"), size_guidance={"scalars": 0})
    with suppress(DirectoryDeletedError):  # there is no such directory
        log.Reload()
    curves = {}
    for name in log.Tags()["scalars"]:
        events = log.Scalars(name)
        steps, values, times = (np.array([getattr(e, key) for e in events]) for key in ("step", "value", "wall_time"))
        curves[name] = (steps, values, times)
    if not curves:
        raise InputError(f"{run / 'log'} holds no logged losses")
    return curves


def concatenate_curves(runs: Sequence[dict[str, Curve]]) -> dict[str, Curve]:
    """The curves of several runs, one after another, as if they were one run."""
    joined: dict[str, Curve] = {}
    offset = 0
    for curves in runs:
        for name, (steps, *rest) in curves.items():
            pieces = zip(joined.get(name, (np.zeros(0),) * 3), (steps + offset, *rest), strict=True)
            joined[name] = tuple(np.concatenate(pair) for pair in pieces)  # type: ignore[assignment]
        offset += max(int(steps[-1]) for steps, _, _ in curves.values())
    return joined


def summary(config: TrainConfig, curves: dict[str, Curve], machine: dict[str, object]) -> dict[str, object]:
    """A run's configuration, steps, hours of audio and training, mean of the last tenth of each curve, and machine."""
    from omegaconf import OmegaConf

    steps, _, times = max(curves.values(), key=lambda curve: len(curve[0]))  # some begin after a head start
    last = {name: float(values[-max(1, len(values) // 10) :].mean()) for name, (_, values, _) in curves.items()}
    intervals = np.diff(times)
    # an interruption of the run counts as ten intervals at most
    working = float(np.minimum(intervals, 10 * np.median(intervals)).sum()) if len(intervals) else 0.0
    return {
        "configuration": OmegaConf.to_container(OmegaConf.structured(config)),
        "steps": int(steps[-1]),
        "hours of audio heard": round(int(steps[-1]) * config.data.batch_size * config.data.seconds / 3600, 2),
        "hours of training": round(working / 3600, 2),
        "at the end": last,
        "machine": machine,
    }


def draw(path: Path, curves: dict[str, Curve]) -> None:
    """Draw the curves, each with a smoothed one, as a PNG."""
    shown = [name for name in CURVES if name in curves]
    rows = -(-len(shown) // 3)
    figure = plot.new_figure(12, 2.6 * rows + 0.4, dpi=100)
    grid = list(figure.subplots(rows, 3, squeeze=False).flat)
    last = max(steps[-1] for steps, _, _ in curves.values())
    for axes in grid[len(shown) :]:
        axes.axis("off")
    for axes, name in zip(grid, shown, strict=False):
        steps, values, _ = curves[name]
        axes.plot(steps, values, color="#2b6cb0", alpha=0.2, linewidth=0.6)
        pieces = np.array_split(np.arange(len(steps)), min(SMOOTHED_POINTS, len(steps)))
        axes.plot([steps[p].mean() for p in pieces], [values[p].mean() for p in pieces], color="#c05621")
        axes.set_xlim(0, last)  # losses of the codec begin after the discriminators' head start
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        if values.min() > 0 and values.max() > 4 * np.median(values):
            axes.set_yscale("log")
    figure.savefig(path, format="png")


def _main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs, in order.")],
    target: Annotated[Path, typer.Argument(help="Output folder.")],
    int8: Annotated[bool, typer.Option(help="Store weights as int8 and scales, not as fp16.")] = False,
    evaluation: Annotated[Path | None, typer.Option(help="JSON of `fastmimi evaluate`, to be copied.")] = None,
    earlier: Annotated[Path | None, typer.Option(help="training.json of the model that the first run loaded.")] = None,
) -> None:
    publish(runs, target, int8, evaluation, earlier)


if __name__ == "__main__":
    typer.run(_main)
