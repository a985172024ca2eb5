"""Which implementation of an operation runs: the eager reference or Triton, chosen by device.

Every operation takes ``impl``. ``auto`` is Triton where all tensors are on a CUDA device, the kernels take their type
and Triton is installed, else eager. Triton also runs on the CPU, in its interpreter (slow, for tests): set
TRITON_INTERPRET=1 before Python starts.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from sparsity_kernels.checks import dtype_name

Impl = Literal["auto", "eager", "triton"]
IMPLS = ("auto", "eager", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """The implementation that was asked for cannot run here."""


def runs_triton(impl: Impl, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether Triton runs an operation on ``tensors``.

    Args:
        dtypes: types that the kernels take of the first tensor; empty: any. ``auto`` is eager for other types.

    Raises:
        ValueError: ``impl`` is none of the three, the tensors are on different devices, or ``impl="triton"`` and the
            first tensor has none of ``dtypes``.
        BackendError: ``impl="triton"`` and it cannot run on their device.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if impl == "eager":
        return False
    device, dtype = devices.pop(), tensors[0].dtype
    takes = not dtypes or dtype in dtypes
    if impl == "auto":
        return takes and device.type == "cuda" and torch.version.hip is None and installed()
    if not installed():
        raise BackendError('impl="triton" needs the package triton, which is not installed; use impl="eager"')
    if device.type != "cuda" and not interpreted():
        raise BackendError(
            f'impl="triton" needs tensors on a CUDA device, got {device}; use impl="eager", or set TRITON_INTERPRET=1 '
            "before Python starts to run Triton's interpreter"
        )
    if not takes:
        allowed = ", ".join(map(dtype_name, dtypes))
        raise ValueError(f'impl="triton" takes tensors of {allowed}, got tensors of {dtype_name(dtype)}')
    return True


def device_of(tensor: Tensor) -> AbstractContextManager:
    """A block in which the tensor's CUDA device is the current one, where Triton launches; no-op for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
