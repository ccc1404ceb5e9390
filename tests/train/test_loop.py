"""Training runs: overfitting a sentence, and runs that are killed, stopped, fail and resume."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import numpy as np
import pytest
import soundfile
import torch

import fastmimi
from fastmimi.devtools.testing import noise
from fastmimi.train import loop
from fastmimi.train.data import TEACHER_RATE, AudioFolder, Batch
from fastmimi.train.loop import checkpoints, train
from fastmimi.train.step import TrainingStep, codebook_usage

pytestmark = pytest.mark.slow

SPEECH = Path(__file__).resolve().parents[1] / "data" / "synthetic.ogg"  # from a speech synthesizer


def scalars(out, name):
    """{step: value} from a run's log; the last value of steps that were repeated on resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(Path(out) / "log"))
    log.Reload()
    return {event.step: event.value for event in log.Scalars(name)}


# Learning


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without straight-through"])
def test_training_overfits_only_with_straight_through_gradients(tiny_training, monkeypatch, whole):
    """Without straight-through gradients, most entries of the codebooks fall out of use."""
    import soxr

    if not whole:
        from fastmimi.models.quantizer import ResidualQuantizer

        through = ResidualQuantizer.unproject
        monkeypatch.setattr(ResidualQuantizer, "unproject", lambda self, x, *rest: through(self, x.detach(), *rest))
    torch.manual_seed(0)
    options = {"raw": 0.0, "dropout": False, "kmeans_latents": 100, "lr": 2e-3, "betas": [0.8, 0.99]}
    config = tiny_training(adversarial=0.0, features=0.0, l1=0.1, **options)
    config.model.changes |= {"hidden_size": 64, "upsample_groups": 64, "num_filters": 8}
    training_step = TrainingStep(config, accelerate.Accelerator(cpu=True))
    audio = torch.from_numpy(soundfile.read(SPEECH, frames=96_000, dtype="float32")[0]).view(4, 1, 24_000)
    teacher_audio = torch.from_numpy(
        np.stack([soxr.resample(window[0], 24_000, TEACHER_RATE) for window in audio.numpy()])
    )
    logged = [training_step(Batch(audio, teacher_audio, ["synthetic"] * 4, []), step).scalars for step in range(110)]
    learned = logged[-1]["mel"] < 0.5 * logged[0]["mel"] and logged[-1]["cosine"] > logged[0]["cosine"] + 0.3
    codes = training_step.codec.eval().encode(audio)
    share = codebook_usage(codes, 32).min().item()
    assert (learned and share >= 0.5) is whole, (logged[0], logged[-1], share)


# Resuming


def command(config, *changes):
    path = Path(config.out).with_suffix(".yaml")
    config.write(path)
    return [sys.executable, "-m", "fastmimi", "train", str(path), *changes]


def wait_for(what, process, seconds=240):
    for _ in range(seconds * 20):
        if what():
            return
        assert process.poll() is None, f"the process ended with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError("timed out")


def test_a_killed_run_resumes_with_the_same_results(tiny_training, speech, tmp_path):
    config = tiny_training(folder=str(speech), steps=7, save_every=2)
    train(config)
    uninterrupted = {name: scalars(config.out, name) for name in ("mel", "discriminator", "cosine", "commitment")}
    whole = fastmimi.load(Path(config.out) / "model").state_dict()
    config.out = str(tmp_path / "broken")
    process = subprocess.Popen(command(config), env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: len(checkpoints(Path(config.out))) >= 1, process)
    process.kill()
    process.wait()
    before = checkpoints(Path(config.out))[-1].name
    assert before < "step_00000007"
    time.sleep(1.1)  # TensorBoard orders log files by the second in their names
    train(config)
    for name, values in uninterrupted.items():
        again = scalars(config.out, name)
        assert again.keys() == values.keys() == set(range(1, 8))
        assert again == pytest.approx(values, rel=1e-4, abs=1e-6), name
    broken = fastmimi.load(Path(config.out) / "model").state_dict()
    assert all(torch.allclose(broken[name], whole[name], rtol=1e-3, atol=1e-5) for name in whole)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_a_checkpoint(tiny_training, speech):
    """SIGTERM goes to the whole process group, as job schedulers send it: to the data loader processes, too."""
    config = tiny_training(folder=str(speech), steps=100_000, save_every=100_000, workers=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(config), env=environment, start_new_session=True)
    log = Path(config.out) / "log"
    wait_for(lambda: log.is_dir() and any(f.stat().st_size > 500 for f in log.iterdir()), process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    [found] = checkpoints(Path(config.out))
    config.steps = int(found.name[5:]) + 1
    assert fastmimi.load(train(config)).total_codebooks == 4


def test_a_finished_run_is_not_repeated(tiny_training, speech):
    config = tiny_training(folder=str(speech), steps=2)
    model = train(config) / "model.safetensors"
    before = model.stat().st_mtime_ns
    train(config)
    assert model.stat().st_mtime_ns == before


def test_a_model_that_could_not_be_written_is_written_on_resume(tiny_training, speech, monkeypatch):
    config = tiny_training(folder=str(speech), steps=1)
    monkeypatch.setattr(loop, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert fastmimi.load(train(config)).total_codebooks == 4


def test_partial_checkpoints_of_a_killed_run_are_deleted(tiny_training, speech):
    config = tiny_training(folder=str(speech), steps=1)
    partial = Path(config.out) / "checkpoints" / ".step_00000007.part"
    partial.mkdir(parents=True)
    train(config)
    assert not partial.exists()


def test_a_nan_loss_stops_the_run(tiny_training, speech, monkeypatch):
    config = tiny_training(folder=str(speech), steps=6, save_every=2)
    whole, calls = loop.TrainingStep.__call__, []

    def poisoned(self, batch, step):
        calls.append(step)
        result = whole(self, batch, step)
        return result._replace(losses=result.losses | {"mel": torch.tensor(torch.nan)}) if step == 3 else result

    monkeypatch.setattr(loop.TrainingStep, "__call__", poisoned)
    sentence = r"stopped at step 4: mel is nan; the batch was .*\.wav, .*\.wav; the last good .* is .*step_00000002"
    with pytest.raises(ValueError, match=sentence):
        train(config)
    assert calls == [0, 1, 2, 3] and [path.name for path in checkpoints(Path(config.out))] == ["step_00000002"]
    monkeypatch.setattr(loop.TrainingStep, "__call__", whole)
    train(config)
    assert checkpoints(Path(config.out))[-1].name == "step_00000006"


def test_a_nan_gradient_stops_the_run(tiny_training, speech, monkeypatch):
    config = tiny_training(folder=str(speech), steps=2, adversarial=0.0, features=0.0)
    backward = accelerate.Accelerator.backward
    monkeypatch.setattr(accelerate.Accelerator, "backward", lambda self, loss: backward(self, loss * torch.inf))
    with pytest.raises(ValueError, match=r"stopped at step 1: gradient is nan; .*the last good checkpoint is none"):
        train(config)


def test_gradients_that_always_overflow_in_fp16_stop_the_run(tiny_training, speech, monkeypatch):
    config = tiny_training(folder=str(speech), steps=9, save_every=2)
    whole, held = loop.TrainingStep.__call__, (0, 2, 3)

    def skipped(self, batch, step):
        return whole(self, batch, step)._replace(skipped=step not in held)

    monkeypatch.setattr(loop.TrainingStep, "__call__", skipped)
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 3)
    with pytest.raises(ValueError, match=r"stopped at step 7: the gradients of 3 consecutive steps overflowed in fp16"):
        train(config)


def test_a_checkpoint_of_another_codec_is_refused(tiny_training, speech):
    config = tiny_training(folder=str(speech), steps=1)
    train(config)
    config.steps, config.model.changes = 2, config.model.changes | {"num_filters": 8}
    with pytest.raises(ValueError, match=r"run holds a run with model\.changes .*'num_filters': 4.*: choose another"):
        train(config)


def test_a_run_resumes_only_with_the_same_configuration(tiny_training, speech):
    """Except for fields that its results do not depend on."""
    config = tiny_training(folder=str(speech), steps=1)
    train(config)
    with pytest.raises(
        ValueError, match=r"run holds a run with optimizer\.lr 0\.0008, got 1e-06: choose another `out`"
    ):
        train(tiny_training(folder=str(speech), steps=2, lr=1e-6))
    assert loop.TrainConfig.read(Path(config.out) / "config.yaml").optimizer.lr == 8e-4
    train(tiny_training(folder=str(speech), steps=2, workers=1, impl="auto"))


def test_a_damaged_checkpoint_is_skipped(tiny_training, speech, capfd):
    config = tiny_training(folder=str(speech), steps=2, save_every=1)
    train(config)
    older, newer = checkpoints(Path(config.out))
    (newer / "model.safetensors").write_bytes(b"cut")
    (older.parent / "step_1 copy").mkdir()
    config.steps = 3
    train(config)
    assert "step_00000002/model.safetensors cannot be read: SafetensorError" in capfd.readouterr().err
    assert list(scalars(config.out, "mel")) == [1, 2, 3]
    older, newer = checkpoints(Path(config.out))
    (older / "optimizer.bin").write_bytes((older / "optimizer.bin").read_bytes()[:-100])
    (newer / "custom_checkpoint_1.pkl").unlink()
    with pytest.raises(ValueError, match="run holds no checkpoint that can be read"):
        train(config)


def test_a_bug_is_not_taken_for_a_damaged_checkpoint(tiny_training, speech, monkeypatch):
    config = tiny_training(folder=str(speech), steps=1)
    train(config)
    monkeypatch.setattr(loop._Counters, "load_state_dict", lambda self, state: state["no such counter"])
    with pytest.raises(KeyError, match="no such counter"):
        train(config)


def test_an_error_of_a_data_loader_process_has_one_line(tiny_training, tmp_path):
    """Although the message that PyTorch raises is the traceback of that process."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.wav").write_bytes(b"RIFF nothing")
    config = tiny_training(folder=str(tmp_path / "broken"), steps=1, workers=1)
    with pytest.raises(fastmimi.InputError, match=r"^100 files in a row could not be read, the last one .*a\.wav$"):
        train(config)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("where", [(loop.TrainingStep, "__call__"), (AudioFolder, "read")], ids=["run", "loader"])
def test_data_loader_processes_end_with_the_run(tiny_training, speech, monkeypatch, where):
    """Wherever it fails: otherwise Python would wait for them for ever at exit."""

    def broken(*_):
        raise KeyError

    monkeypatch.setattr(*where, broken)
    with pytest.raises(KeyError) as error:  # keeps the traceback alive
        train(tiny_training(folder=str(speech), steps=5, workers=2))
    assert not multiprocessing.active_children(), error


def test_data_loader_processes_ignore_only_the_first_sigterm():
    code = "import time; from fastmimi.train.data import _ignore_first_sigterm as ignore; ignore(0); print(flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_only_the_newest_checkpoints_are_kept(tiny_training, speech):
    config = tiny_training(folder=str(speech), steps=4, save_every=1)
    train(config)
    names = [path.name for path in (Path(config.out) / "checkpoints").iterdir()]
    assert sorted(names) == ["step_00000003", "step_00000004"]


# The trained model


def test_the_trained_model_loads_in_the_transformers_drop_in(tiny_training, speech):
    model = train(tiny_training(folder=str(speech), steps=2))
    audio = noise(1, 1, 9600)
    codec = fastmimi.load(model)
    codes = codec.encode(audio)
    drop_in = fastmimi.MimiModel.from_pretrained(model)
    assert torch.equal(drop_in.encode(audio, num_quantizers=4).audio_codes, codes)


def test_a_trained_jodio_has_the_learned_entries(tiny_training, speech, monkeypatch):
    seen, whole = [], loop.TrainingStep.__call__
    monkeypatch.setattr(loop.TrainingStep, "__call__", lambda self, *rest: seen.append(self) or whole(self, *rest))
    config = tiny_training(architecture="jodio", folder=str(speech), steps=4)
    codec = fastmimi.JodioModel.from_pretrained(train(config))
    assert codec.decode(codec.encode(noise(1, 1, 9600))).isfinite().all()
    for mine, trained in zip(codec.quantizer.parts(4), seen[-1].codec.quantizer.parts(4), strict=True):
        assert torch.equal(mine[0].codebooks(), trained[0].codebooks()) and mine[0].codebooks().any()


def test_training_can_start_from_loaded_weights(tiny_training, speech, tmp_path):
    first = train(tiny_training(folder=str(speech), steps=3, out=str(tmp_path / "first")))
    config = tiny_training(folder=str(speech), steps=1, load=str(first), freeze=["encoder", "quantizer"])
    train(config)
    config.steps = 2
    second = fastmimi.load(train(config)).state_dict()  # resumes after the first step
    before = fastmimi.load(first).state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], second[name])}
    assert moved == {"encoder_transformer", "downsample", "upsample", "decoder_transformer", "decoder"}


@pytest.mark.parametrize("head_start", [0, 2])
def test_the_trained_model_has_averaged_weights(tiny_training, speech, monkeypatch, head_start):
    settings = {"n_ffts": [128], "filters": 2, "head_start": head_start}
    config = tiny_training(folder=str(speech), steps=3 + head_start, ema=0.5, discriminator=settings)
    seen, whole = [], loop.TrainingStep.__call__

    def watched(self, batch, step):
        result = whole(self, batch, step)
        seen.append(self.codec.decoder.layers["0"].conv.weight.detach().clone())
        return result

    monkeypatch.setattr(loop.TrainingStep, "__call__", watched)
    model = fastmimi.load(train(config))
    first, second, third = seen[head_start:]
    average = 0.5 * (0.5 * first + 0.5 * second) + 0.5 * third
    assert torch.allclose(model.decoder.layers["0"].conv.weight, average, atol=1e-6)


# Several processes


@pytest.mark.skipif(sys.platform != "linux", reason="two processes on a CPU, through gloo")
def test_two_processes_give_the_results_of_one(tiny_training, speech, tmp_path):
    """The same windows, divided, with a head start of the discriminators.

    Only replacements of unused entries are random, and none is replaced in four steps of the codec.
    """
    options = {"raw": 0.0, "dropout": False, "batch_size": 4, "kmeans_latents": 24, "replace_every": 1000}
    config = tiny_training(folder=str(speech), steps=5, save_every=5, **options)
    config.discriminator.head_start = 1
    train(config)
    names = ("mel", "discriminator", "cosine", "commitment", "gradient")
    alone = {name: scalars(config.out, name) for name in names}
    config.out = str(tmp_path / "together")
    config.write(tmp_path / "together.yaml")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastmimi", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [sys.executable, *launch, str(tmp_path / "together.yaml")]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
    states = [path.name for path in checkpoints(Path(config.out))[-1].glob("random_states_*")]
    assert sorted(states) == ["random_states_0.pkl", "random_states_1.pkl"], "there were two processes"
    for name, values in alone.items():
        # including the norm of the gradient: the weights of the losses do not depend on the number of processes
        assert scalars(config.out, name) == pytest.approx(values, rel=0.02), name


def test_unreadable_files_are_counted(tiny_training, speech):
    (speech / "broken.wav").write_bytes(b"RIFF nothing")
    config = tiny_training(folder=str(speech), steps=8)
    train(config)
    counts = scalars(config.out, "unread files")
    assert list(counts.values()) == sorted(counts.values()) and counts[8] >= 1
    time.sleep(1.1)
    config.steps = 9
    train(config)
    assert scalars(config.out, "unread files")[9] >= counts[8], "the count continues after a stop"
