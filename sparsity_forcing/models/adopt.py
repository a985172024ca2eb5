"""Takes a model that exists, from a directory or the hub, as it is: its files are copied, not rewritten."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from sparsity_forcing.models.load import MODEL_FILES, require_whole, resolve, weight_files


def adopt(name: str, directory: Path) -> dict:
    """Copies the model ``name`` into the empty ``directory``, once it is known to be whole and supported.

    Pickled weights and code are left behind. Returns what `describe` says, with the hub's revision where there is one.

    Raises:
        ModelError: as `models.load.load`.
    """
    source = resolve(name)
    require_whole(source)
    wanted = {path.name for path in weight_files(source)}
    for pattern in MODEL_FILES:
        for path in source.glob(pattern):
            if path.suffix != ".safetensors" or path.name in wanted:
                shutil.copyfile(path, directory / path.name)  # follows the links of the hub cache
    revision = source.name if source.parent.name == "snapshots" else None
    return {**describe(directory), "revision": revision}


def describe(directory: Path) -> dict:
    """Family, number of parameters, bytes and dtypes of the weights in a model directory."""
    parameters, dtypes, size = 0, Counter(), 0
    for shard in weight_files(directory):
        size += shard.stat().st_size
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_slice(key)
                count = math.prod(tensor.get_shape())
                parameters += count
                dtypes[tensor.get_dtype()] += count
    return {
        "family": require_whole(directory).model_type,
        "parameters": parameters,
        "weight_bytes": size,
        "dtypes": dict(sorted(dtypes.items())),
    }
