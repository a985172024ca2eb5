"""``python -m sparsity_forcing.evaluation``: lmms-eval's own command line, usable beside a CPU-only torch.

The same as ``python -m lmms_eval`` with the same arguments, which cannot import torchvision there (see
`sparsity_forcing.torchvision_ops`)::

    python -m sparsity_forcing.evaluation --model sparsity_forcing --model_args pretrained=models/policy,p=0.975 \
        --include_path evaluation/tasks --tasks read_8x8,sum_8x8 --batch_size 32
"""

from __future__ import annotations

import runpy

from sparsity_forcing.torchvision_ops import declare_missing_ops

if __name__ == "__main__":
    declare_missing_ops()
    runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
