"""Names a training: all that decides its weights."""

from __future__ import annotations

from pathlib import Path

import sparsity_kernels

from sparsity_forcing.inputs import BASE, TRAIN, VALIDATION
from sparsity_forcing.lineage import code_digest, file_digest, versions
from sparsity_forcing.params import Params
from sparsity_forcing.scoring import score_code

# The code that decides what comes out; the sparse kernels are added to it.
CODE = ("attention", "generation", "models", "rl", "selection", "data/schema.py", "scoring.py")
DECISIVE_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "triton", "math-verify")
# What may differ in the run that goes on from a checkpoint: how often it saves and shows, what memory it takes.
INDIFFERENT = {
    *("checkpoint_every", "keep_checkpoints", "log_samples_every", "validation_batch_size"),
    *("micro_batch_prompts", "logits_chunk", "gradient_checkpointing"),
}


def decisive(params: Params, root: Path, processes: int, sharded: bool = False) -> dict:
    """All that decides the weights that come out, by what it is: parameters as in params.yaml, ``code`` and ``files``
    as digests. A checkpoint of anything else is not resumed from, nor is a ``sharded`` one where weights are whole."""
    code = [*CODE, Path(sparsity_kernels.__file__).parent, *score_code(params.train.reward.correct)]
    files = sorted(path for path in (root / BASE).rglob("*") if path.is_file())
    return {
        "train": params.train.model_dump(exclude=INDIFFERENT),
        "sparsity": params.sparsity.model_dump(),
        "seed": params.seed,
        "model.dtype": params.model.dtype,
        "processes": f"{processes}, sharded" if sharded else processes,
        "code": code_digest(code),
        "versions": versions(DECISIVE_PACKAGES),
        "files": {
            path.relative_to(root).as_posix(): file_digest(path, "sha256")
            for path in (*files, root / TRAIN, root / VALIDATION)
        },
    }
