"""Loading, and everything that can be wrong with a model directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from sparsity_forcing import load
from sparsity_forcing.models.adopt import adopt
from sparsity_forcing.models.families import ModelError, UnsupportedModelError
from sparsity_forcing.models.load import require_whole, weight_files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_what_was_asked_for(model_directory, dtype):
    model, processor = load(model_directory, dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    assert processor.tokenizer.padding_side == "left"


def without(*patterns):
    def remove(directory):
        for pattern in patterns:
            for path in directory.glob(pattern):
                path.unlink()

    return remove


def cut_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def fewer_tensors(directory):
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1." not in k}, path, metadata={"format": "pt"})


def other_shapes(directory):
    path = directory / "model.safetensors"
    save_file({k: v[:1].clone() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def missing_shard(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def shard_elsewhere(directory):
    (directory / "model.safetensors").unlink()
    shards = {"a": "../model.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def pickled_weights(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def wants_code(directory):
    (directory / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}})
    )
    (directory / "configuration_mine.py").write_text("raise SystemExit('code of the model was run')")


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("*"), r"has no config\.json"),
        (lambda directory: (directory / "config.json").write_text("{"), r"config\.json is not a usable config"),
        (
            lambda directory: (directory / "config.json").write_text("{}"),
            r"config\.json is not a usable config.*model_type",
        ),
        (wants_code, r"config\.json is not a usable configuration"),
        (without("*.safetensors"), "has no weights"),
        (pickled_weights, r"has no weights.*pytorch_model\.bin is pickled"),
        (missing_shard, r"lacks 1 of 2 weight files, first model-00002-of-00002\.safetensors"),
        (shard_elsewhere, r"names '\.\./model\.safetensors'; weight files lie beside"),
        (cut_weights, r"model\.safetensors is damaged or cut short"),
        (fewer_tensors, r"lack \d+ tensors of the model, first .*layers\.1\."),
        (other_shapes, "the weights in .* do not load"),
        (without("tokenizer*"), "has no tokenizer"),
        (without("*processor_config.json"), "has no processor"),
        (lambda directory: (directory / "processor_config.json").write_text("{"), "the processor in .* does not load"),
    ],
)
def test_a_broken_directory_is_named_with_what_is_wrong(model_directory, damage, message):
    damage(model_directory)
    with pytest.raises(ModelError, match=message) as caught:
        load(model_directory, device="cpu")
    assert str(model_directory) in str(caught.value)


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'qwen2' is not a vision-language model"):
        load(tmp_path)


def test_names_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file; give the directory"):
        load(tmp_path / "file")
    with pytest.raises(ModelError, match="does not exist; give a `save_pretrained` directory or a hub id"):
        load(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="models/base does not exist"):
        load("models/base")
    with pytest.raises(ModelError, match=r"owner/model is no directory here and not in the hub cache.*HF_HUB_OFFLINE"):
        load("owner/model")


def test_a_hub_id_is_taken_from_the_cache_with_its_revision(model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub/models--owner--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(revision)
    (cached / "snapshots").mkdir()
    model_directory.rename(cached / "snapshots" / revision)
    model, _ = load("owner/tiny", device="cpu")
    assert model.config.model_type == "qwen2_5_vl"
    (tmp_path / "taken").mkdir()
    found = adopt("owner/tiny", tmp_path / "taken")
    assert found["revision"] == revision
    assert found["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())


def test_options_that_are_not_there(model_directory, monkeypatch):
    with pytest.raises(ModelError, match="dtype 'int4' is unknown; one of float32, bfloat16, float16"):
        load(model_directory, dtype="int4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="'cuda': torch sees no CUDA device"):
        load(model_directory, device="cuda")


def test_sharded_weights_are_whole_too(model_directory):
    expected = load(model_directory, device="cpu")[0].state_dict()
    tensors = load_file(model_directory / "model.safetensors")
    (model_directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, model_directory / shard, metadata={"format": "pt"})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (model_directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert require_whole(model_directory).model_type == "qwen2_5_vl"
    assert [path.name for path in weight_files(model_directory)] == sorted(shards)
    model, _ = load(model_directory, device="cpu")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
