"""Loads a vision-language model with its processor, from a local directory or the hub, with the real classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from sparsity_forcing.models.families import ModelError, require_supported

# What a model directory is made of. Pickled weights (*.bin, *.pt) and code (*.py) are left out on purpose.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name: str | Path, dtype: str = "float32", device: str = "auto") -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in eval mode and its processor, as plain transformers loads them.

    Args:
        name: a `save_pretrained` directory, or a hub id, which is downloaded to the hub cache.
        dtype: float32, bfloat16 or float16.
        device: a torch device; `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        ModelError: there is no such model, a file of it is missing or damaged, or its family is not supported.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; one of {', '.join(DTYPES)}")
    directory = resolve(name)
    require_whole(directory)
    model = _load_weights(directory, DTYPES[dtype])
    return model.to(pick_device(device)).eval(), _load_processor(directory)


def pick_device(device: str) -> torch.device:
    """The device that ``auto`` or a torch device name stands for."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(device)


def resolve(name: str | Path) -> Path:
    """The local directory of a model: ``name`` itself, or the hub snapshot that the hub id ``name`` stands for."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the directory that `save_pretrained` wrote")
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not str(name).startswith(".")
    if not is_hub_id or (len(path.parts) > 1 and path.parent.is_dir()):
        raise ModelError(f"{path} does not exist; give a `save_pretrained` directory or a hub id")
    return _download(str(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated on the hub; accept its terms there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name} is neither a directory here nor a model on the hub") from error
    except HFValidationError as error:
        raise ModelError(f"{name} is neither a directory here nor a valid hub id: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{name} is no directory here and not in the hub cache, and the hub cannot be asked: {_first_line(error)} "
            "Unset HF_HUB_OFFLINE and check the connection, or give a local directory"
        ) from error


def require_whole(directory: Path) -> PretrainedConfig:
    """The configuration of the model in ``directory``, once it is known to be whole and supported.

    Raises:
        ModelError: configuration, weights, tokenizer or processor is missing or damaged, or the family is unsupported.
    """
    config = _read_config(directory)
    require_supported(config, str(directory))
    for shard in weight_files(directory):
        _require_readable(shard)
    _require_any(directory, TOKENIZER_FILES, "tokenizer")
    _require_any(directory, PROCESSOR_FILES, "processor")
    return config


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model, sorted: the shards its index names, or the single file."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        hint = f"; {pickled[0]} is pickled, which is not read: convert it to safetensors" if pickled else ""
        raise ModelError(f"{directory} has no weights: no model.safetensors and no model.safetensors.index.json{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({_first_line(error)}); copy the model again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}; weight files lie beside their index")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; copy them"
        )
    return [directory / name for name in names]


def _require_readable(shard: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt"):
            pass  # the header is checked against the file's size
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard} is damaged or cut short ({_first_line(error)}); copy it again") from error


def _require_any(directory: Path, names: tuple[str, ...], what: str) -> None:
    # Without this check transformers builds an empty tokenizer for some families and says nothing.
    if not any((directory / name).is_file() for name in names):
        raise ModelError(
            f"{directory} has no {what} (none of {', '.join(names)}); "
            "save the processor beside the model: processor.save_pretrained(directory)"
        )


def _read_config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; give the directory that `save_pretrained` wrote")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory / 'config.json'} is not a usable configuration: {_first_line(error)}") from error


def _load_weights(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the weights in {directory} do not load: {_first_line(error)}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ModelError(
            f"the weights in {directory} lack {len(missing)} tensors of the model, first {missing[0]}; "
            "config.json and weights are not of the same model"
        )
    return model


def _load_processor(directory: Path) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the processor in {directory} does not load: {_first_line(error)}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{directory} holds a {type(processor).__name__}, not a processor for text and images; "
            "save the model's own: processor.save_pretrained(directory)"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
