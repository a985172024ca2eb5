"""Lets torchvision import beside a CPU-only torch.

The package index serves one torchvision build, made against CUDA torch. Beside a CPU-only torch its import fails with
``operator torchvision::nms does not exist``, because its compiled library is not loaded while its Python code registers
a fake kernel for the operator. Declaring the schemas first cures it; nothing here ever runs non-maximum suppression.
transformers needs torchvision for the video half of Qwen-VL processors, which has no PIL twin.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

_library: torch.library.Library | None = None


def declare_missing_ops() -> None:
    """Declares ``torchvision::nms`` and ``qnms`` once, on CPU-only torch, before torchvision's first import."""
    global _library
    if _library is not None or torch.version.cuda is not None or "torchvision" in sys.modules:
        return
    if importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
