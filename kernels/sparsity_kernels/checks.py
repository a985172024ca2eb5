"""What the operations check of their tensors alike."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_attention_tensors(dimensions: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """``query`` has four dimensions, ``key`` and ``value`` have ``dimensions``; all are what attention kernels take.

    Raises:
        ValueError: another number of dimensions, types that differ or are not taken, an empty tensor, a last dimension
            that is not contiguous.
    """
    for name, tensor, wanted in (("query", query, 4), ("key", key, dimensions), ("value", value, dimensions)):
        if tensor.ndim != wanted:
            raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                "query, key and value must share one of float32, bfloat16, float16, float64, got "
                f"{query.dtype}, {key.dtype}, {value.dtype}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def check_head_dim(dim: int) -> None:
    """ValueError where the kernels do not take the head dim."""
    if not 16 <= dim <= 256:
        raise ValueError(f"head dim must be in 16 … 256, got {dim}")


def dtype_name(dtype: torch.dtype) -> str:
    """As a message has it: float32."""
    return str(dtype).removeprefix("torch.")


def form(tensor: Tensor) -> str:
    """As a message has it: (2, 5) float32."""
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"


def some(numbers: list[int]) -> str:
    """A list for a message; of a long one the beginning."""
    return f"[{', '.join(map(str, numbers[:8]))}{', …' if len(numbers) > 8 else ''}]"
