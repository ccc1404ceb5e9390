"""What all launchers of this backend share: the check of the target, and the launch itself.

Every kernel is launched through `launch`, on the device of its tensors. If Triton cannot build it for that GPU, the
error names the op and says how to go on without its kernel. `make kernels-report` replaces `launch` to record all
launches of a model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

TritonError = OutOfResources.__mro__[1]  # imported by way of a subclass: its module differs between Triton versions
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _nothing():
    pass


INTERPRETED_PROGRAMS = 8  # among which the interpreter shares work; more are only slower
INTERPRETED = not isinstance(_nothing, triton.JITFunction)  # TRITON_INTERPRET=1 was set when Triton was imported


def unsupported(target: Any) -> str | None:
    """One sentence that says why this backend cannot run on the target (device and dtype), or None if it can."""
    if target.dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not in {str(target.dtype)[6:]}"
    if target.device == "cpu" and INTERPRETED:
        return None
    if target.device != "cuda":
        return f"Triton kernels run on CUDA and ROCm GPUs, not on {target.device}"
    if not torch.cuda.is_available():
        return "Triton kernels run on a GPU, and PyTorch finds none here"
    devices = range(torch.cuda.device_count())
    if torch.version.hip is None and (least := min(map(torch.cuda.get_device_capability, devices))) < (8, 0):
        return f"Triton kernels need compute capability 8.0, a GPU here has {least[0]}.{least[1]}"
    return None


def launch(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of the first argument.

    Raises RuntimeError, which names the op and how to go on without it, if Triton cannot build the kernel for this GPU.
    """
    device = args[0].device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*args, **(for_amd(options) if torch.version.hip else options))
    except TritonError as error:
        raise RuntimeError(
            f"the Triton kernel of {op} cannot be built for {_name(device)} "
            f"({type(error).__name__}: {str(error).strip()}); "
            f'go on without it: impl={{"{op}": "reference"}}'
        ) from error


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"


def precision(x: Tensor) -> str:
    """`input_precision` of `tl.dot`: fp32 is computed as three TF32 products on tensor cores, as accurate as fp32."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def has_warp_groups(x: Tensor) -> bool:
    """Whether the GPU multiplies from shared memory, as from Hopper on: accumulators have more registers to themselves.

    Without a GPU, where kernels are interpreted or compiled ahead of time, yes.
    """
    return not x.is_cuda or (torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0))


def programs(x: Tensor) -> int:
    """How many programs run at the same time on any GPU like x's, whatever their registers."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return INTERPRETED_PROGRAMS


def may_wait(x: Tensor) -> bool:
    """Whether programs may wait for each other (`_wait.py`); the interpreter's run one after another."""
    return x.is_cuda and not is_amd(x)


def is_amd(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is not None


def for_amd(options: dict[str, Any]) -> dict[str, Any]:
    """Launch options for AMD GPUs, which have no TF32, only 64 KiB of shared memory per block, and other registers."""
    changes = {"PRECISION": "ieee", "SELECT": False, "num_stages": min(2, options.get("num_stages", 2))}
    changed = {**options, **{name: value for name, value in changes.items() if name in options}}
    return {name: value for name, value in changed.items() if name != "maxnreg"}
