"""What the tests of all operations share: the device, the largest tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU Triton runs in its interpreter (conftest.py)


class LargestTensor(TorchDispatchMode):
    """``nbytes``: of the largest tensor that an operation inside the block returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return results
