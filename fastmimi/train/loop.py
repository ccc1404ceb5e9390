"""A training run: batches, steps, what is written down, checkpoints, and how it stops and goes on.

    out/config.yaml               the run's configuration, whole
    out/machine.json              where it runs, and with what
    out/checkpoints/step_N/       everything that going on needs; complete, or not there under that name
    out/model/                    the averaged codec, as `fastmimi.load` takes it
    out/log/                      TensorBoard: losses, rates, audio

A run that finds a checkpoint in `out` goes on from it, and then equals the one that was never stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import accelerate
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from transformers import get_scheduler

from .. import __version__
from ..checkpoints.weights import save_pretrained
from ..errors import InputError
from ..models.codec import Codec
from . import data
from .config import TrainConfig
from .data import Batch, Windows, source_of
from .step import Steps

KEPT = 2  # checkpoints, the newest ones
MOST_SKIPPED = 100  # steps in a row whose gradient fp16 could not hold


# what reading a file raises that was cut, is missing or was changed
DAMAGED = (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError)


class Stopped(SystemExit):
    """SIGTERM was answered with a checkpoint."""


def train(config: TrainConfig) -> Path:
    """Run, or go on, to the end; the folder of the averaged codec.

    Raises InputError for a configuration that does not fit its data or its checkpoint, and where a loss is no longer a
    number: with the step, the files of the batch, and the last good checkpoint.
    """
    run = _Run(config)
    try:
        run.go_on()
        watched = _on_sigterm(run.accelerator.set_trigger)
        with run.progress as progress, watched, closing(run.remaining()) as batches:  # closed: its processes end
            task = progress.add_task("Training", total=config.steps, completed=run.done, losses="")
            for batch in batches:
                losses = run.step(batch)
                stop = run.accelerator.check_trigger()
                save = stop or run.done % config.save_every == 0 or run.done == config.steps
                progress.update(task, completed=run.done)
                if run.done % config.listen_every == 0:
                    run.listen()
                if save or run.done % config.log_every == 0:
                    told = _told(run.write(losses))
                    progress.update(task, losses=told)
                if save:
                    run.save()
                    if progress.disable and run.accelerator.is_main_process:  # where no bar moves
                        typer.echo(f"step {run.done} of {config.steps}: {told}", err=True)
                if stop:
                    raise Stopped(128 + signal.SIGTERM)
    finally:
        run.close()
    return run.out / "model"


@dataclass
class _Counts:
    """What a run that goes on must not begin anew."""

    unread: int = 0  # files
    skipped: int = 0  # steps, the last ones in a row

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


class _Run:
    def __init__(self, config: TrainConfig):
        self.config, self.out = config, Path(config.out)
        if checkpoints(self.out):
            config.check_same_run(TrainConfig.read(self.out / "config.yaml"))
        # the codebooks, which are buffers, move by the same numbers everywhere
        alike = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[alike])
        set_seed(config.seed)
        self.learns = Steps(config, self.accelerator)
        codec, optimizer = self.learns.codec, config.optimizer
        self.windows = Windows(
            source_of(config.data), config.data.seconds, codec.sample_rate, codec.config.audio_channels, config.seed,
            heard=config.distillation.teacher is not None,
        )  # fmt: skip
        self.average = AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(optimizer.ema))
        self.counts = _Counts()
        self.rates = [
            get_scheduler(optimizer.schedule, each.optimizer, optimizer.warmup_steps, config.steps)
            for each in (self.learns.optimizer, self.learns.critic)
            if each is not None
        ]
        self.accelerator.register_for_checkpointing(self.learns.balancer, self.average, self.counts, *self.rates)
        self.done = 0
        self.writer: SummaryWriter | None = None
        self.batch: Batch | None = None

    @property
    def averaged(self) -> Codec:
        codec: Any = self.average.module
        return codec

    @property
    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        hidden = not (self.accelerator.is_main_process and console.is_terminal)
        return Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=hidden)

    def go_on(self) -> None:
        """From the newest checkpoint that can be read, if there is one."""
        found = checkpoints(self.out)
        read = next((checkpoint for checkpoint in reversed(found) if self._load(checkpoint)), None)
        if read is not None:
            self.done = _step_of(read)
        elif found:
            raise InputError(f"{self.out} holds no checkpoint that can be read: choose another `out`")
        place = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = data.batches(self.windows, self.config.data, self.done, self.config.steps, place)
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            self.config.write(self.out / "config.yaml")
            (self.out / "machine.json").write_text(json.dumps(self._machine(), indent=1) + "\n")
            for left in (self.out / "checkpoints").glob(".step_*.part"):  # of a run that was killed
                shutil.rmtree(left)
            self.writer = SummaryWriter(str(self.out / "log"), purge_step=self.done + 1)

    def _machine(self) -> dict[str, Any]:
        device = self.accelerator.device
        return {
            "versions": {"fastmimi": __version__, "torch": torch.__version__, "accelerate": accelerate.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
        }

    def _load(self, checkpoint: Path) -> bool:
        try:
            self.accelerator.load_state(str(checkpoint))
        except DAMAGED as error:
            typer.echo(f"{checkpoint} cannot be read: {type(error).__name__} {error}".splitlines()[0], err=True)
            return False
        return True

    def remaining(self) -> Generator[Batch]:
        try:
            for batch in self.batches:
                yield batch.to(self.accelerator.device)
            return
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # a cycle, which holds on to the processes that read: they end
            if not isinstance(error, InputError):
                raise
            # it comes with the whole traceback of such a process
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{_full_name(InputError)}: ")
        raise InputError(sentence)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        # what a step draws depends on its number alone, so that it is the same after a stop
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        set_seed(self.config.seed + self.done * processes + rank)
        losses = self.learns(batch, self.done)
        finite = torch.stack([loss.isfinite() for loss in losses.values()]).all()
        # of all processes: which are well, and how many files they could not read
        both = torch.stack([finite.float(), torch.tensor(float(len(batch.unread)), device=finite.device)])
        well, unread = self.accelerator.reduce(both, "sum").tolist()
        if well != processes:
            wrong = ", ".join(f"{name} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite())
            last = checkpoints(self.out)
            raise InputError(
                f"training stopped at step {self.done + 1}: {wrong or 'a loss of another process is not finite'}; "
                f"the batch was {', '.join(batch.names)}; the last good checkpoint is {last[-1] if last else 'none'}"
            )
        self.counts.skipped = 0 if "gradient" in losses else self.counts.skipped + 1
        if self.counts.skipped == MOST_SKIPPED:
            raise InputError(f"training stopped at step {self.done + 1}: fp16 held none of {MOST_SKIPPED} gradients")
        for rate in self.rates:
            rate.step()
        self._average()
        self.counts.unread += int(unread)
        self.done += 1
        self.batch = batch
        return losses

    @torch.no_grad()
    def _average(self) -> None:
        self.average.update_parameters(self.learns.codec)
        # entries are running means already, and those that were dead must not come back slowly
        pairs = zip(self.averaged.parameters(), self.learns.codec.parameters(), strict=True)
        for mean, parameter in pairs:
            if not parameter.requires_grad:
                mean.copy_(parameter)

    def write(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Into the log; what was written."""
        of_all = self.accelerator.reduce(torch.stack([loss.float() for loss in losses.values()]), "mean")
        told = dict(zip(losses, of_all.tolist(), strict=True))
        told |= {"rate": self.rates[0].get_last_lr()[0], "unread files": float(self.counts.unread)}
        if self.writer is not None:
            for name, value in told.items():
                self.writer.add_scalar(name, value, self.done)
        return told

    @torch.no_grad()
    def listen(self) -> None:
        """To a window of the last batch, before and after, in the log."""
        if self.writer is None or self.batch is None:
            return
        audio, codec = self.batch.audio[:1], self.averaged.eval()
        decoded = codec.decode(codec.encode(audio))
        for name, sound in (("original", audio), ("decoded", decoded)):
            self.writer.add_audio(name, sound[0].mean(dim=0).clamp(-1, 1), self.done, codec.sample_rate)

    def save(self) -> None:
        """A checkpoint, and the averaged codec; older checkpoints go."""
        target = self.out / "checkpoints" / f"step_{self.done:08d}"
        part = target.with_name(f".{target.name}.part")
        if self.writer is not None:
            self.writer.flush()  # a run that goes on from here does not write these steps again
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self.out / "model").mkdir(exist_ok=True)
            save_pretrained(self.averaged, self.out / "model")
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            for old in checkpoints(self.out)[:-KEPT]:
                shutil.rmtree(old)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.accelerator.end_training()


def checkpoints(out: Path) -> list[Path]:
    """The complete ones of a run's folder, the newest last."""
    found = (path for path in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _told(values: dict[str, Any]) -> str:
    names = ("mel", "features", "adversarial", "discriminator", "cosine", "explained")
    return "  ".join(f"{name} {values[name]:.3f}" for name in names if name in values)


@contextmanager
def _on_sigterm(act: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
