"""Which implementation of an operation runs: the eager reference or Triton, chosen by device.

Every operation takes ``impl``. ``auto`` is Triton where all tensors are on a CUDA device and Triton is installed, else
eager. Triton also runs on the CPU, in its interpreter (slow, for tests): set TRITON_INTERPRET=1 before Python starts.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "eager", "triton"]
IMPLS = ("auto", "eager", "triton")


class BackendError(RuntimeError):
    """The implementation that was asked for cannot run here."""


def runs_triton(impl: Impl, *tensors: Tensor) -> bool:
    """Whether Triton runs an operation on ``tensors``.

    Raises:
        ValueError: ``impl`` is none of the three, or the tensors are on different devices.
        BackendError: ``impl="triton"`` and it cannot run on their device.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if impl == "eager":
        return False
    device = devices.pop()
    if impl == "auto":
        return device.type == "cuda" and torch.version.hip is None and installed()
    if not installed():
        raise BackendError('impl="triton" needs the package triton, which is not installed; use impl="eager"')
    if device.type != "cuda" and not interpreted():
        raise BackendError(
            f'impl="triton" needs tensors on a CUDA device, got {device}; use impl="eager", or set TRITON_INTERPRET=1 '
            "before Python starts to run Triton's interpreter"
        )
    return True


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
