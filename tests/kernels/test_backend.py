"""Where an operation runs: which implementation, on which device, and that nobody waits for it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from kernel_tests import DEVICE
from sparsity_kernels import (
    BackendError,
    attention_mass,
    causal_attention,
    compact,
    device_of,
    keep_highest,
    kept_attention,
    ragged_attention,
    top_p_count,
)
from sparsity_kernels.backend import TRITON_DTYPES, runs_triton

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]


class Calls:
    """A call of each operation; all tensors, and counts on the host, are made beforehand."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        draw = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)  # noqa: E731
        self.query, self.key, self.value = draw(2, 4, 9, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16)
        self.slots = torch.arange(9, device=DEVICE).expand(2, -1)
        self.valid = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
        self.kept = self.slots % 2 == 0
        self.counts = self.kept.sum(-1).tolist()
        self.mass, self.p = torch.rand(2, 9, device=DEVICE), torch.full((2,), 0.5, device=DEVICE)

    def attention_mass(self, impl: str) -> None:
        query, key = self.query.clone().requires_grad_(), self.key.clone().requires_grad_()
        attention_mass(query, key, self.slots, self.valid, 0.25, impl).sum().backward()

    def kept_attention(self, impl: str) -> None:
        inputs = [tensor.clone().requires_grad_() for tensor in (self.query, self.key, self.value)]
        kept_attention(*inputs, self.slots, self.slots + 1, 0.25, impl).sum().backward()

    def causal_attention(self, impl: str) -> None:
        causal_attention(self.query, self.key, self.value, 0.25)

    def top_p(self, impl: str) -> None:
        keep_highest(self.mass, self.valid, top_p_count(self.mass, self.valid, self.p, impl), impl)

    def compaction(self, impl: str) -> None:
        cache = compact(self.key, self.value, self.kept, room=2, impl=impl, lengths=self.counts)
        cache.append(self.key[:, :, :1], self.value[:, :, :1])
        cache = cache.grown(1).select([1, 0])
        cache.reserve(1)
        cache.write(self.key[:, :, :1], self.value[:, :, :1])

    def ragged_attention(self, impl: str) -> None:
        query, key, value = self.query[:, :, :1], *(tensor[0].transpose(0, 1) for tensor in (self.key, self.value))
        ragged_attention(query, key, value, self.slots[:, 0] * 0, self.slots[:, 3].int(), 0.25, impl)


OPERATIONS = ("attention_mass", "kept_attention", "top_p", "compaction", "ragged_attention")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_launched_on_the_device_of_their_tensors(operation, monkeypatch):
    """Triton launches on the current device: with the tensors on another one it would read foreign addresses."""
    inside, launched = [], []
    module = importlib.import_module(f"sparsity_kernels.{operation}.triton")

    class Block:
        def __init__(self, tensor):
            assert tensor.device.type == DEVICE

        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    monkeypatch.setattr(module, "device_of", Block)
    runtime = importlib.import_module("triton.runtime.interpreter" if DEVICE == "cpu" else "triton.runtime.jit")
    launcher = runtime.GridExecutor if DEVICE == "cpu" else runtime.JITFunction
    name = "__call__" if DEVICE == "cpu" else "run"
    launch = getattr(launcher, name)

    def watched(*args, **keywords):
        launched.append(bool(inside))
        return launch(*args, **keywords)

    monkeypatch.setattr(launcher, name, watched)
    getattr(Calls(), operation)("triton")
    assert launched
    assert all(launched)


def test_the_device_of_a_cpu_tensor_changes_nothing():
    with device_of(torch.zeros(1)) as nothing:
        assert nothing is None


def on(device: str, dtype: torch.dtype) -> SimpleNamespace:
    """A tensor as far as the choice looks at it."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_auto_is_eager_for_types_that_the_kernels_do_not_take():
    assert runs_triton("auto", on("cuda:0", torch.float32), dtypes=TRITON_DTYPES)
    assert runs_triton("auto", on("cuda:0", torch.float64))
    assert not runs_triton("auto", on("cuda:0", torch.float64), dtypes=TRITON_DTYPES)
    assert not runs_triton("auto", on("cpu", torch.float32), dtypes=TRITON_DTYPES)
    assert not runs_triton("eager", on("cuda:0", torch.float32), dtypes=TRITON_DTYPES)


def test_triton_refuses_types_that_the_kernels_do_not_take():
    assert runs_triton("triton", on("cuda:0", torch.bfloat16), dtypes=TRITON_DTYPES)
    with pytest.raises(ValueError, match="takes tensors of float32, bfloat16, float16, got tensors of float64"):
        runs_triton("triton", on("cuda:0", torch.float64), dtypes=TRITON_DTYPES)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="CUDA device, got cpu"):
        runs_triton("triton", on("cpu", torch.float32))


@pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=needs_gpu) for name in (*OPERATIONS, "causal_attention")]
)
def test_nobody_waits_for_a_gpu(operation):
    call = getattr(Calls(), operation)
    call("triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operation", [pytest.param(name, marks=needs_gpu) for name in OPERATIONS])
def test_auto_takes_float64_on_a_gpu(operation):
    getattr(Calls(torch.float64), operation)("auto")
