"""Command-line options, threads, hypothesis settings, and fixtures that several test files use."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# No deadline: the time of an example depends on the machine. "fuzz" is for tests/test_fuzz.py (`make fuzz`).
hypothesis.settings.register_profile("fastmimi", deadline=None, print_blob=True)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=10_000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        action="store_true",
        help="also run the Triton kernels' parity tests: on the GPU where there is one, else in Triton's interpreter",
    )

    parser.addoption("--threads", type=int, default=1, help="PyTorch's threads per process (default: 1)")
    parser.addoption("--onnxruntime-web", help="a node_modules folder with it, for the tests of the page in a browser")
    parser.addoption("--native-library", help="a build of the native CPU kernels to test instead of the installed one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: runs Triton kernels; needs --kernels")
    # One by default: small tensors gain nothing from more, and waiting threads spin and slow down a busy machine.
    torch.set_num_threads(config.getoption("--threads"))
    if not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("fastmimi")
    if library := config.getoption("--native-library"):
        from fastmimi.kernels.cpu import _native

        _native.library_path = lambda: Path(library)
    if config.getoption("--kernels"):
        _prepare_triton()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--kernels"):
        reason = "runs Triton kernels: pass --kernels"
    elif not _has_triton():
        reason = "runs Triton kernels: there is no Triton for this platform"
    else:
        return
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason=f"{item.name} {reason}"))


@pytest.fixture(params=["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)])
def op(request: pytest.FixtureRequest) -> Iterator[Callable[..., torch.Tensor]]:
    """Each implementation of the op that the test file is named after; tensors are created on its device.

    Elements of the output that an implementation does not write are NaN.
    """
    from fastmimi.runtime.dispatch import implementation, is_absent

    name = request.module.__name__.rpartition("test_")[2]
    if is_absent(name, request.param):
        pytest.skip(f"there is no {request.param} kernel of {name}")
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    with torch.device("cuda" if on_gpu else "cpu"):
        op = implementation(name, request.param)
        yield skipping_unsupported(op, name, request.param) if request.param in ("cpu", "onednn") else op
    torch.use_deterministic_algorithms(False)


def skipping_unsupported(op: Callable[..., Any], name: str, candidate: str) -> Callable[..., torch.Tensor]:
    """Wrap a CPU implementation: tests in dtypes that it does not support are skipped, with its own reason."""
    from fastmimi.runtime.dispatch import Target, why_not

    def call(*inputs: torch.Tensor, **options: object) -> torch.Tensor:
        first = next(t for t in inputs if t.is_floating_point())
        if (why := why_not(candidate, name, Target("cpu", first.dtype))) is not None:
            pytest.skip(why)
        return op(*inputs, **options)

    return call


@pytest.fixture(scope="session")
def repository() -> dict[str, str]:
    """{path: source} of every Python file, except in links, hidden folders, environments and build outputs."""
    sources = {}
    for folder, folders, files in os.walk(ROOT):
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        skipped = ("build", "dist", "out", "node_modules", "__pycache__")
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            sources[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return sources


@pytest.fixture
def programs_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[int, ...]]]:
    """Called with a number: launches have up to so many programs that may wait for each other; returns their grids.

    Programs run at the same time, as processes of Triton's interpreter, which share the tensors.
    """
    if sys.platform != "linux":
        pytest.skip("processes are forked, as on Linux")
    if torch.cuda.is_available():
        pytest.skip("a GPU runs programs at the same time")
    from triton.runtime.interpreter import interpreter_builder as builder

    from fastmimi.kernels.triton import _launch

    def program(kernel: Any, grid: tuple[int, ...], index: tuple[int, ...], args: Any, options: Any) -> None:
        set_index, set_grid = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx, builder.set_grid_dim = lambda *_: set_index(*index), lambda *_: set_grid(*grid)
        kernel[1, 1](*args, **options)

    def launch(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launched.append(grid)
        args = tuple(a.share_memory_() if isinstance(a, torch.Tensor) else a for a in args)
        fork, whole = multiprocessing.get_context("fork"), (*grid, 1, 1)[:3]
        indices = itertools.product(*map(range, whole))
        processes = [fork.Process(target=program, args=(kernel, whole, i, args, options)) for i in indices]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * len(processes)

    def at_once(programs: int) -> list[tuple[int, ...]]:
        monkeypatch.setattr(_launch, "launch", launch)
        monkeypatch.setattr(_launch, "programs", lambda x: programs)
        monkeypatch.setattr(_launch, "may_wait", lambda x: True)
        return launched

    launched: list[tuple[int, ...]] = []
    return at_once


def _prepare_triton() -> None:
    """Without a GPU, select Triton's interpreter by the variable that Triton reads when it is first imported."""
    if sys.platform == "linux" and not _has_triton():
        raise pytest.UsageError("--kernels needs Triton: pip install triton")
    if torch.cuda.is_available():
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before --kernels could select its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    from fastmimi.devtools.testing import patch_triton_interpreter
    from fastmimi.errors import InputError

    try:
        patch_triton_interpreter()
    except InputError as error:
        raise pytest.UsageError(f"--kernels: {error}") from None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Training


@pytest.fixture
def wavlm_config(tmp_path):
    """The config.json of a WavLM with 32 features, for a teacher with random weights."""
    from transformers import WavLMConfig

    path = tmp_path / "wavlm.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    WavLMConfig(**sizes, **convolutions).to_json_file(path)
    return path


@pytest.fixture
def tiny_training(tmp_path, wavlm_config):
    """A function that makes configurations of tiny runs; arguments set fields by name, whatever their section."""

    def make(architecture="mimi", **given):
        from fastmimi.train.config import TrainConfig

        sizes = {
            "mimi": {
                "hidden_size": 32, "num_filters": 4, "codebook_size": 32, "codebook_dim": 16,
                "vector_quantization_hidden_dimension": 16, "num_quantizers": 4, "upsample_groups": 32,
                "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
            },
            "jodio": {
                "channels": 8, "codebook_size": 32, "num_acoustic_quantizers": 2, "sliding_window": 6,
                "encoder_transformer": {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
                                        "head_dim": 8, "intermediate_size": 36},
                "decoder_transformer": {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3,
                                        "head_dim": 4, "intermediate_size": 24},
            },
        }  # fmt: skip
        values = {
            "out": str(tmp_path / "run"),
            "model": {"architecture": architecture, "changes": sizes[architecture], "impl": "reference"},
            "data": {"folder": str(tmp_path), "seconds": 0.5, "batch_size": 2, "workers": 0},
            "quantizer": {"kmeans_latents": 15},
            "losses": {"mel": 1.0, "l1": 1.0},
            "discriminator": {"n_ffts": [256, 128], "filters": 4},
            "distillation": {"teacher": str(wavlm_config)},
            "log_every": 1,
        }
        for name, value in given.items():
            section = next((key for key in SECTIONS if name in SECTIONS[key]), None)
            (values if section is None else values.setdefault(section, {}))[name] = value
        return TrainConfig.of(values)

    return make


SECTIONS = {  # sections of a training configuration, and the fields that tests set by name alone
    "model": ("impl", "freeze", "load"),
    "data": ("folder", "seconds", "batch_size", "workers"),
    "optimizer": ("kind", "lr", "betas", "ema"),
    "quantizer": ("raw", "dropout", "kept_levels", "replace_every", "begin", "kmeans_latents"),
    "losses": ("adversarial", "features", "mel", "l1", "spectrum"),
    "distillation": ("teacher",),
}
