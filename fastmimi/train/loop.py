"""The training loop: batches, steps, logging, checkpoints, stopping and resuming.

    out/config.yaml               the run's configuration, defaults included
    out/machine.json              device, number of processes and versions of packages
    out/checkpoints/step_N/       the complete training state; under this name only once it is fully written
    out/model/                    the codec with averaged (EMA) weights, a checkpoint for `fastmimi.load`
    out/log/                      TensorBoard: losses, learning rates, audio

If `out` contains a checkpoint, the run is resumed from it and gives the results of a run that was never interrupted.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from transformers import get_scheduler

from .. import __version__
from ..checkpoints.weights import save_pretrained
from ..errors import InputError
from ..models.codec import Codec
from . import data
from .config import TrainConfig
from .data import Batch, Windows, open_source
from .step import StepResult, TrainingStep

CHECKPOINTS_KEPT = 2  # older ones are deleted
MAX_SKIPPED_STEPS = 100  # consecutive steps that are skipped because a gradient overflows in fp16


class Stopped(SystemExit):
    """The run ended after SIGTERM; a checkpoint was saved."""


def train(config: TrainConfig) -> Path:
    """Run or resume a training run to its end, and return the folder of the averaged codec.

    Raises InputError for a configuration that does not fit its data or its checkpoint, and for a NaN or infinite loss
    or gradient: the message names the step, the files of the batch and the last checkpoint. Raises Stopped after
    SIGTERM.
    """
    run = _Run(config)
    try:
        run.resume()
        on_sigterm, batches = _on_sigterm(run.accelerator.set_trigger), run.remaining_batches()
        run.open_log()
        with run.progress as progress, on_sigterm, closing(batches):
            task = progress.add_task("Training", total=config.steps, completed=run.completed_steps, losses="")
            for batch in batches:
                result = run.step(batch)
                stop = run.accelerator.check_trigger()
                save = stop or run.completed_steps % config.save_every == 0 or run.completed_steps == config.steps
                progress.update(task, completed=run.completed_steps)
                if run.completed_steps % config.listen_every == 0:
                    run.log_audio(batch)
                if save or run.completed_steps % config.log_every == 0:
                    logged = _format_scalars(run.log_scalars(result))
                    progress.update(task, losses=logged)
                if save:
                    run.save()
                    if progress.disable and run.accelerator.is_main_process:  # no progress bar is shown
                        typer.echo(f"step {run.completed_steps} of {config.steps}: {logged}", err=True)
                if stop:
                    raise Stopped(128 + signal.SIGTERM)
    finally:
        run.close()
    return run.out / "model"


@dataclass
class _Counters:
    """Counters that are saved with a checkpoint, so that a resumed run continues them."""

    unread: int = 0  # files that could not be read, over all processes
    skipped: int = 0  # consecutive steps up to now that were skipped because a gradient overflows in fp16

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


class _Run:
    """The state of one run: models, optimizers, schedules, data and log."""

    def __init__(self, config: TrainConfig):
        self.config, self.out = config, Path(config.out)
        if checkpoints(self.out):
            config.check_same_run(TrainConfig.read(self.out / "config.yaml"))
        # codebooks are buffers that every process updates identically: nothing has to be broadcast
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[ddp])
        set_seed(config.seed)
        self.training_step = TrainingStep(config, self.accelerator)
        codec, optimizer = self.training_step.codec, config.optimizer
        self.windows = Windows(
            open_source(config.data), config.data.seconds, codec.sample_rate, codec.config.audio_channels, config.seed,
            with_teacher=config.distillation.teacher is not None,
        )  # fmt: skip
        self.ema = AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(optimizer.ema))
        self.counters = _Counters()
        # optimizers, and the steps in which each is used
        trained = [(self.training_step.optimizer, config.steps - config.discriminator.head_start)]
        if self.training_step.discriminator_optimizer is not None:
            trained.append((self.training_step.discriminator_optimizer, config.steps))
        self.schedulers = [
            get_scheduler(optimizer.schedule, wrapped.optimizer, optimizer.warmup_steps, steps)
            for wrapped, steps in trained
        ]
        self.stateful = (self.training_step.balancer, self.ema, self.counters, *self.schedulers)
        self.accelerator.register_for_checkpointing(*self.stateful)
        self.completed_steps = 0
        self.writer: SummaryWriter | None = None

    @property
    def ema_codec(self) -> Codec:
        """The codec with averaged weights."""
        codec = self.ema.module
        assert isinstance(codec, Codec)
        return codec

    @property
    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        hidden = not (self.accelerator.is_main_process and console.is_terminal)
        return Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=hidden)

    def resume(self) -> None:
        """Load the newest readable checkpoint, if there is one."""
        found = checkpoints(self.out)
        loaded = next((checkpoint for checkpoint in reversed(found) if self._load(checkpoint)), None)
        if loaded is not None:
            self.completed_steps = _step_of(loaded)
        elif found:
            raise InputError(f"{self.out} holds no checkpoint that can be read: choose another `out`")

    def open_log(self) -> None:
        """Make the run's folder, and describe the run there; continue its log after the completed steps."""
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            self.config.write(self.out / "config.yaml")
            (self.out / "machine.json").write_text(json.dumps(self._machine(), indent=1) + "\n")
            for partial in (self.out / "checkpoints").glob(".step_*.part"):  # left by a run that was killed
                shutil.rmtree(partial)
            self.writer = SummaryWriter(str(self.out / "log"), purge_step=self.completed_steps + 1)

    def _machine(self) -> dict[str, object]:
        device = self.accelerator.device
        return {
            "versions": {"fastmimi": __version__, "torch": torch.__version__, "accelerate": accelerate.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
        }

    def _load(self, checkpoint: Path) -> bool:
        """Load a checkpoint, and return whether all its files could be read."""
        for name in self._checkpoint_files():
            if (error := _read_error(checkpoint / name)) is not None:
                reason = f"{type(error).__name__} {error}".splitlines()[0]
                typer.echo(f"{checkpoint / name} cannot be read: {reason}", err=True)
                return False
        self.accelerator.load_state(str(checkpoint))
        return True

    def _checkpoint_files(self) -> list[str]:
        """The files that `Accelerator.load_state` needs."""
        suffixes = [""] if self.training_step.discriminators is None else ["", "_1"]
        names = [name for suffix in suffixes for name in (f"model{suffix}.safetensors", f"optimizer{suffix}.bin")]
        names += [f"custom_checkpoint_{i}.pkl" for i in range(len(self.stateful))]
        return names if self.accelerator.scaler is None else [*names, "scaler.pt"]

    def remaining_batches(self) -> Generator[Batch]:
        """The batches of the remaining steps, on the run's device; closing it ends the data loader processes."""
        process = self.accelerator.process_index, self.accelerator.num_processes
        return self._on_device(
            data.batches(self.windows, self.config.data, self.completed_steps, self.config.steps, process)
        )

    def _on_device(self, batches: Iterable[Batch]) -> Generator[Batch]:
        try:
            for batch in batches:
                yield batch.to(self.accelerator.device)
            return
        except Exception as error:
            # the traceback keeps the data loader alive through a reference cycle; without it, its processes end
            traceback.clear_frames(error.__traceback__)
            if not isinstance(error, InputError):
                raise
            # PyTorch passes on the whole traceback of the data loader process as the message
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{_full_name(InputError)}: ")
        raise InputError(sentence)

    def step(self, batch: Batch) -> StepResult:
        """Train on a batch. Raises InputError if a loss or metric is NaN or infinite."""
        # the random numbers of a step depend only on its number, so that a resumed run draws the same
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        set_seed(self.config.seed + self.completed_steps * processes + rank)
        result = self.training_step(batch, self.completed_steps)
        scalars = result.scalars
        finite = torch.stack([value.isfinite() for value in scalars.values()]).all()
        # one reduction over all processes: how many have finite losses, and how many files could not be read
        counts = torch.stack([finite.float(), torch.tensor(float(len(batch.unread)), device=finite.device)])
        finite_processes, unread = self.accelerator.reduce(counts, "sum").tolist()
        if finite_processes != processes:
            wrong = ", ".join(f"{name} is {value.item()}" for name, value in scalars.items() if not value.isfinite())
            saved = checkpoints(self.out)
            raise InputError(
                f"training stopped at step {self.completed_steps + 1}: "
                f"{wrong or 'a loss of another process is NaN or infinite'}; "
                f"the batch was {', '.join(batch.names)}; the last good checkpoint is {saved[-1] if saved else 'none'}"
            )
        self.counters.skipped = self.counters.skipped + 1 if result.skipped else 0
        if self.counters.skipped == MAX_SKIPPED_STEPS:
            raise InputError(
                f"training stopped at step {self.completed_steps + 1}: "
                f"the gradients of {MAX_SKIPPED_STEPS} consecutive steps overflowed in fp16"
            )
        codec_scheduler, *discriminator_schedulers = self.schedulers
        for scheduler in discriminator_schedulers:
            scheduler.step()
        if self.completed_steps >= self.config.discriminator.head_start:
            codec_scheduler.step()
            self._update_ema()
        self.counters.unread += int(unread)
        self.completed_steps += 1
        return result

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Update the exponential moving average of the codec's weights; copy what has no gradient."""
        self.ema.update_parameters(self.training_step.codec)
        # codebook entries are moving averages already, and a replaced entry must take effect at once
        pairs = zip(self.ema_codec.parameters(), self.training_step.codec.parameters(), strict=True)
        for averaged, parameter in pairs:
            if not parameter.requires_grad:
                averaged.copy_(parameter)

    def log_scalars(self, result: StepResult) -> dict[str, float]:
        """Log a step's scalars, averaged over all processes, the learning rates and the unread files; return them."""
        means = self.accelerator.reduce(torch.stack([value.float() for value in result.scalars.values()]), "mean")
        logged = dict(zip(result.scalars, means.tolist(), strict=True))
        rates = [scheduler.get_last_lr()[0] for scheduler in self.schedulers]
        if self.completed_steps <= self.config.discriminator.head_start:
            rates[0] = 0.0  # the codec is not trained yet
        logged |= dict(zip(("rate", "discriminator rate"), rates, strict=False))  # there may be no discriminators
        logged |= {"unread files": float(self.counters.unread)}
        if self.writer is not None:
            for name, value in logged.items():
                self.writer.add_scalar(name, value, self.completed_steps)
        return logged

    @torch.no_grad()
    def log_audio(self, batch: Batch) -> None:
        """Log the first window of a batch, and what the averaged codec decodes its codes to."""
        if self.writer is None:
            return
        audio, codec = batch.audio[:1], self.ema_codec.eval()
        decoded = codec.decode(codec.encode(audio))
        for name, sound in (("original", audio), ("decoded", decoded)):
            self.writer.add_audio(name, sound[0].mean(dim=0).clamp(-1, 1), self.completed_steps, codec.sample_rate)

    def save(self) -> None:
        """Save a checkpoint and the averaged codec, and delete old checkpoints."""
        target = self.out / "checkpoints" / f"step_{self.completed_steps:08d}"
        part = target.with_name(f".{target.name}.part")
        if self.writer is not None:
            self.writer.flush()  # a run that resumes from here does not log these steps again
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self.out / "model").mkdir(exist_ok=True)
            save_pretrained(self.ema_codec, self.out / "model")
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            for old in checkpoints(self.out)[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.accelerator.end_training()


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    found = (path for path in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=_step_of)


def _read_error(file: Path) -> Exception | None:
    """Why a file of a checkpoint cannot be read; None if it can."""
    try:
        if file.suffix == ".safetensors":
            load_file(file)
        else:
            torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the libraries raise anything; no code of this package runs here
        return error
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _format_scalars(values: dict[str, float]) -> str:
    """The most telling scalars on one line, for the progress bar."""
    names = ("mel", "features", "adversarial", "discriminator", "cosine", "explained")
    return "  ".join(f"{name} {values[name]:.3f}" for name in names if name in values)


@contextmanager
def _on_sigterm(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` at SIGTERM within the context."""
    previous = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
