"""The model class for lmms-eval: any supported checkpoint under any method, with token ratios per question.

From lmms-eval's own command line::

    python -m lmms_eval --model sparsity_forcing --model_args pretrained=models/policy,p=0.975 --tasks chartqa

(beside a CPU-only torch: ``python -m sparsity_forcing.evaluation`` with the same arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from sparsity_forcing.evaluation.answers import Answer, answer_batch
from sparsity_forcing.methods import Full, Method, sparse_method
from sparsity_forcing.params import SparsityParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass
class SparseTokenCounts(TokenCounts):
    """lmms-eval's token counts with the token ratios, so that they are in the evaluator's own samples."""

    answer: Answer | None = None

    def to_dict(self) -> dict[str, object]:
        extra = {} if self.answer is None else {key: getattr(self.answer, key) for key in SAMPLE_KEYS}
        return super().to_dict() | extra


SAMPLE_KEYS = ("visual_tokens", "token_ratio", "visual_token_ratio", "layer_ratio", "layer_visual_ratio")


class LoadedModel(lmms):
    """A loaded model under a method.

    ``on_progress`` is called with the number of questions answered by each batch; without it a bar is shown.
    ``max_new_tokens`` holds for tasks that name no limit of their own.
    """

    is_simple = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        method: Method,
        batch_size: int = 32,
        max_new_tokens: int = 16,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.processor, self.method = model, processor, method
        self.batch_size_per_gpu, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.on_progress = on_progress

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self):
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers every request; prompts of similar length share a batch, so that little is spent on padding."""
        questions = [_Question(index, request, self.task_dict) for index, request in enumerate(requests)]
        questions.sort(key=lambda question: (question.settings_key, question.size(), question.index))
        results: dict[int, GenerationResult] = {}
        title = f"{self.method.name} p={self.method.p:g}"
        with tqdm(total=len(requests), desc=title, disable=self.on_progress is not None) as bar:
            for _, alike in groupby(questions, key=lambda question: question.settings_key):
                for batch in batched(alike, self.batch_size):
                    for question, result in zip(batch, self._answer(batch), strict=True):
                        results[question.index] = result
                    bar.update(len(batch))
                    if self.on_progress is not None:
                        self.on_progress(len(batch))
        return [results[index] for index in range(len(requests))]

    def _answer(self, batch: list[_Question]) -> list[GenerationResult]:
        settings = batch[0].request.args[2]
        answers = answer_batch(
            self.model,
            self.processor,
            [question.messages() for question in batch],
            self.method,
            generation_arguments(settings, self.max_new_tokens),
        )
        return [
            GenerationResult(
                text=until(answer.text, settings.get("until")),
                token_counts=SparseTokenCounts(
                    input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens, answer=answer
                ),
            )
            for answer in answers
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("likelihood tasks are not supported: use a generate_until task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported: use a generate_until task")


class SparsityForcing(LoadedModel):
    """``--model sparsity_forcing``.

    Args:
        pretrained: a hub id or a `save_pretrained` directory of a supported family.
        dense: True runs the plain dense model; p and the sparsity settings then have no say.
        device: ``auto``, ``cpu`` or ``cuda``. dtype: ``float32``, ``bfloat16`` or ``float16``.
        sparsity: fields of `SparsityParams`: ``p``, ``rule``, ``scoring_rows``, ``prefill``, …
    """

    def __init__(
        self,
        pretrained: str,
        dense: bool = False,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str = 32,
        max_new_tokens: int = 16,
        **sparsity: object,
    ) -> None:
        from sparsity_forcing.models.load import load

        settings = SparsityParams.model_validate(sparsity)
        method = Full() if dense else sparse_method(settings, settings.p)
        super().__init__(*load(pretrained, dtype=dtype, device=device), method, batch_size, max_new_tokens)


@dataclass(frozen=True)
class _Question:
    """A request. Its images are decoded when asked for, not held, so that a long benchmark fits in memory."""

    index: int
    request: Instance
    task_dict: dict

    @property
    def settings_key(self) -> str:
        """Equal for questions that may share a batch."""
        return repr(sorted(self.request.args[2].items()))

    def messages(self) -> list[dict]:
        """The conversation in the form of `models.prompts.encode_messages`."""
        _, to_messages, _, document, task, split = self.request.args
        conversation = []
        for message in to_messages(self.task_dict[task][split][document]):
            unsupported = {part["type"] for part in message["content"]} - {"text", "image"}
            if unsupported:
                raise NotImplementedError(f"task {task}: {sorted(unsupported)} inputs are not supported, only images")
            parts = [
                {"type": "image", "image": part["url"]} if part["type"] == "image" else part
                for part in message["content"]
            ]
            conversation.append({"role": message["role"], "content": parts})
        return conversation

    def size(self) -> tuple[int, int]:
        """Pixels and characters: what the prompt length grows with."""
        parts = [part for message in self.messages() for part in message["content"]]
        pixels = sum(part["image"].width * part["image"].height for part in parts if part["type"] == "image")
        return pixels, sum(len(part["text"]) for part in parts if part["type"] == "text")


def batched(items: Iterable[_Question], size: int) -> Iterator[list[_Question]]:
    """Lists of up to ``size`` items, in order."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def generation_arguments(settings: dict, max_new_tokens: int) -> dict:
    """A task's ``generation_kwargs`` as ``model.generate`` takes them; greedy unless the task samples."""
    temperature = float(settings.get("temperature") or 0.0)
    arguments = {
        "max_new_tokens": int(settings.get("max_new_tokens", max_new_tokens)),
        "num_beams": int(settings.get("num_beams") or 1),
        "do_sample": bool(settings.get("do_sample", temperature > 0)) and temperature > 0,
    }
    if arguments["do_sample"]:
        arguments |= {"temperature": temperature, "top_p": settings.get("top_p")}
    return arguments


def until(text: str, stops: list[str] | str | None) -> str:
    """``text`` before the first of the stop strings.

    A blank line is no stop string: it is what lmms-eval fills in for tasks that name none, and would cut off every
    answer that reasons in paragraphs. lmms-eval's own Qwen2.5-VL model leaves it out too.
    """
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text if stop in ("", "\n\n") else text.split(stop, 1)[0]
    return text
