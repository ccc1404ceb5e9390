"""How many kernels a streamed frame launches on a GPU; counted on the meta device, where nothing runs."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmimi.devtools.testing import noise
from fastmimi.models import checks
from fastmimi.models.codec import Codec
from fastmimi.models.config import MimiCodecConfig
from fastmimi.models.mimi import Mimi
from fastmimi.runtime.ops import OPS, Ops

pytest.importorskip("triton")
# PyTorch's operations that launch nothing: views and allocations
NO_LAUNCH = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze",
    "view", "scalar_tensor",
}  # fmt: skip
MOST = {(1, "encode"): (24, 10), (1, "decode"): (24, 10), (64, "encode"): (56, 10), (64, "decode"): (56, 10)}
"""Launches of ours and of PyTorch by batch and direction."""


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function._schema.name.split("::")[1]
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs, result)))
        if on_gpu and name not in NO_LAUNCH:
            self.counts[name] += 1
        return result


@pytest.fixture
def ours(monkeypatch):
    """The names of the Triton kernels that are launched, none of which runs."""
    from fastmimi.kernels.triton import _launch

    names = []
    monkeypatch.setattr(_launch, "may_wait", lambda x: True)  # as on a GPU
    monkeypatch.setattr(_launch, "launch", lambda op, kernel, grid, *_, **__: names.append(kernel.__name__))
    monkeypatch.setattr(checks, "_values", lambda x, name: None)  # refuses tensors on the meta device
    return names


def kernels():
    from importlib import import_module

    def without_dropout(function):
        return lambda *args, dropout=0.0, residual_dropout=0.0, **options: function(*args, **options)

    modules = {op: import_module(f"fastmimi.kernels.triton.{op}") for op in OPS}
    return Ops(**{op: without_dropout(getattr(module, op)) for op, module in modules.items()})


@pytest.mark.parametrize("batch", [1, 64])
def test_a_streamed_frame(ours, batch):
    model = Mimi(MimiCodecConfig(), num_codebooks=8).eval().bfloat16().to("meta")
    audio = torch.empty(batch, 1, model.frame_size, dtype=torch.bfloat16, device="meta")
    codes = torch.empty(batch, 8, 1, dtype=torch.int64, device="meta")
    with mock.patch.object(Codec, "ops", kernels()):
        state = model.new_state(batch)
        calls = {"encode": lambda: model.encode(audio, state=state), "decode": lambda: model.decode(codes, state=state)}
        for direction, call in calls.items():
            call()  # packs the weights
            ours.clear()
            with Launches() as theirs:
                call()
            launched = (len(ours), theirs.counts.total())
            assert all(n <= most for n, most in zip(launched, MOST[batch, direction], strict=True)), (
                direction, Counter(ours), theirs.counts,
            )  # fmt: skip


def test_a_whole_signal(ours):
    """The convolution from or to the audio is not a launch of its own."""
    model = Mimi(MimiCodecConfig(), num_codebooks=8).eval().bfloat16().to("meta")
    audio = torch.empty(2, 1, 4 * model.frame_size, dtype=torch.bfloat16, device="meta")
    with mock.patch.object(Codec, "ops", kernels()):
        for call in (
            lambda: model.encode(audio),
            lambda: model.decode(torch.empty(2, 8, 4, dtype=torch.int64).to("meta")),
        ):
            ours.clear()
            call()
            found = Counter(ours)
            assert found["audio_resblock_fwd_kernel"] == 1 and found["resblock_fwd_kernel"] == 2, found


@pytest.mark.kernels
def test_histories_are_read_alike_where_pointers_cannot_be_selected(monkeypatch):
    """As on AMD GPUs, whose compiler refuses to choose between the addresses of two tensors."""
    from fastmimi.kernels.triton import _launch, causal_conv1d, causal_conv_transpose1d, resblock

    launch, selected = _launch.launch, []

    def without_selecting(*args, **options):
        selected.append(options.pop("SELECT"))
        launch(*args, SELECT=False, **options)

    x, taken = noise(2, 8, 5), {"first": torch.tensor([True, False]), "active": torch.tensor([True, True])}
    unit = (noise(4, 8, 3, seed=1), noise(4, seed=2), noise(8, 4, 1, seed=3), noise(8, seed=4))
    calls = {
        "flat": (causal_conv1d.causal_conv1d, (x, noise(6, 8, 4)), {"stride": 2, "pad": (2, 0)}, 2),
        "not flat": (causal_conv1d.causal_conv1d, (x, noise(6, 8, 3)), {"pad": (2, 0), "pad_mode": "replicate"}, 2),
        "residual unit": (resblock.resblock, (x, *unit), {"pad": (2, 0)}, 2),
        "transposed": (causal_conv_transpose1d.causal_conv_transpose1d, (x, noise(8, 4, 4)), {"stride": 2}, 1),
        "depthwise": (
            causal_conv_transpose1d.causal_conv_transpose1d, (x, noise(8, 1, 4)), {"stride": 2, "groups": 8}, 1,
        ),
    }  # fmt: skip
    for name, (op, tensors, options, past) in calls.items():
        histories = [noise(2, past, 8, seed=5) for _ in range(2)]
        monkeypatch.setattr(_launch, "launch", launch)
        expected = op(*tensors, **options, history=histories[0], **taken)
        monkeypatch.setattr(_launch, "launch", without_selecting)
        assert torch.equal(op(*tensors, **options, history=histories[1], **taken), expected), name
        assert torch.equal(*histories), name
    assert selected == [True] * len(calls)
