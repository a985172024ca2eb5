"""The real evaluator against a loop of plain `generate` calls, one question at a time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparsity_forcing import sparse_attention
from sparsity_forcing.data.schema import Row
from sparsity_forcing.evaluation.runner import Benchmark, evaluate_model
from sparsity_forcing.evaluation.samples import read_records, sample_records, write_samples
from sparsity_forcing.evaluation.tasks import write_tasks
from sparsity_forcing.methods import Full, TopP
from sparsity_forcing.models.prompts import to_pil
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.scoring import exact_match

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6
METHODS = {"dense": Full(), "sparse": TopP(0.6, SparsityParams(protect_text=False))}


@pytest.fixture(scope="module", autouse=True)
def _data_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def benchmark_tasks(rows, tmp_path_factory) -> Benchmark:
    directory = tmp_path_factory.mktemp("benchmark") / "tasks"
    return Benchmark(directory, write_tasks(rows, directory, "exact_match", NEW_TOKENS), digest="", batch_size=5)


def one_by_one(tiny, rows, method) -> dict[str, dict]:
    """By id: answer, score and ratios from `generate` without batch, padding or any of the evaluation's code."""
    expected = {}
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row.question}]
        text = tiny.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = tiny.processor(text=[text], images=[to_pil(row.images[0])], return_tensors="pt")
        ratios = {"token_ratio": 1.0, "visual_token_ratio": 1.0}
        if isinstance(method, Full):
            output = tiny.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        else:
            with sparse_attention(tiny.model, p=method.p, settings=method.settings) as stats:
                output = tiny.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            ratios = {name: getattr(stats, name).item() for name in ratios}
        prompt = inputs["input_ids"].shape[1]
        said = tiny.processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True).strip()
        visual = int((inputs["input_ids"] == tiny.model.config.image_token_id).sum())
        counts = {"prompt_tokens": prompt, "visual_tokens": visual, "new_tokens": output.shape[1] - prompt}
        expected[row.id] = {"prediction": said, "score": exact_match(said, row.answer), **ratios, **counts}
    return expected


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_evaluator_gives_the_numbers_of_an_independent_loop(tiny, rows, benchmark_tasks, method, tmp_path):
    progress = []
    samples = evaluate_model(tiny.model, tiny.processor, method, benchmark_tasks, progress.append)
    row = {"method": method.name, "checkpoint": "base", "p": method.p}
    path = tmp_path / "samples.parquet"
    write_samples(sample_records(samples, benchmark_tasks.tasks, row), path)
    records = read_records(path)

    expected = one_by_one(tiny, rows, method)
    assert sum(progress) == len(rows)
    assert {record["id"] for record in records} == set(expected)
    for record in records:
        for name, value in expected[record["id"]].items():
            assert record[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), name
        for ratio, layers in (("token_ratio", "layer_ratio"), ("visual_token_ratio", "layer_visual_ratio")):
            assert len(record[layers]) == 2
            assert sum(record[layers]) / 2 == pytest.approx(record[ratio], abs=1e-6)
        assert record["benchmark"] in {"read_6x6", "sum_6x6", "read_8x8", "sum_8x8"}
    right = sum(record["score"] for record in records)
    if isinstance(method, Full):
        assert right == 6  # by construction of the fixture: neither none nor all
    else:
        assert all(record["visual_token_ratio"] < 1 for record in records)
        assert right < 6  # dropping tokens changes a random model's answers


def test_the_evaluators_own_accuracy_by_model_name(tiny, rows, benchmark_tasks):
    """`--model sparsity_forcing` through the entry point and `model_args`, aggregated by lmms-eval."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        "sparsity_forcing",
        model_args=f"pretrained={tiny.directory},p=0.6,protect_text=False,device=cpu",
        batch_size="4",
        tasks=[task.name for task in benchmark_tasks.tasks],
        task_manager=TaskManager(include_path=str(benchmark_tasks.directory), include_defaults=False),
        bootstrap_iters=0,
    )
    expected = one_by_one(tiny, rows, METHODS["sparse"])
    for task in benchmark_tasks.tasks:
        scores = [expected[row.id]["score"] for row in rows if row.label == task.label]
        assert results["results"][task.name]["accuracy,none"] == pytest.approx(sum(scores) / len(scores))
        for sample in results["samples"][task.name]:
            ratio = expected[sample["doc"]["id"]]["visual_token_ratio"]
            assert sample["token_counts"][0]["visual_token_ratio"] == pytest.approx(ratio, abs=1e-6)


@pytest.mark.slow
def test_two_processes_share_the_questions(tiny, rows, benchmark_tasks, tmp_path):
    """lmms-eval's command line under `accelerate launch`, unevenly: every question once, and the score of all."""
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "presets/accelerate/cpu-2proc.yaml"), "-m", "sparsity_forcing.evaluation"]
    launch += ["--model", "sparsity_forcing", "--include_path", str(benchmark_tasks.directory)]
    launch += ["--model_args", f"pretrained={tiny.directory},p=0.6,protect_text=False,device=cpu"]
    launch += ["--tasks", ",".join(task.name for task in benchmark_tasks.tasks)]
    launch += ["--output_path", str(tmp_path), "--log_samples"]
    ended = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (results,) = tmp_path.rglob("*_results.json")
    found = json.loads(results.read_text())["results"]
    expected = one_by_one(tiny, rows, METHODS["sparse"])
    for task in benchmark_tasks.tasks:
        asked = [row for row in rows if row.label == task.label]
        assert len(asked) == 3  # two in a process, one in the other
        (samples,) = tmp_path.rglob(f"*_samples_{task.name}.jsonl")
        told = [json.loads(line) for line in samples.read_text().splitlines()]
        assert sorted(sample["doc_id"] for sample in told) == list(range(len(asked)))
        scores = [expected[row.id]["score"] for row in asked]
        assert found[task.name]["accuracy,none"] == pytest.approx(sum(scores) / len(scores))


def test_unknown_model_arguments_are_refused(tiny):
    from sparsity_forcing.evaluation.lmms_model import SparsityForcing

    with pytest.raises(ValueError, match="scoring_row"):
        SparsityForcing(str(tiny.directory), scoring_row="text")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        SparsityForcing(str(tiny.directory), p=1.5)


def test_videos_are_refused_by_name(tiny):
    from lmms_eval.api.instance import Instance

    from sparsity_forcing.evaluation.lmms_model import LoadedModel

    def to_messages(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "what?"}]}]

    model = LoadedModel(tiny.model, tiny.processor, Full())
    model.task_dict = {"videomme": {"test": [{}]}}
    metadata = {"task": "videomme", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", ("", to_messages, {}, 0, "videomme", "test"), 0, metadata)
    with pytest.raises(NotImplementedError, match=r"videomme: \['video'\] inputs are not supported"):
        model.generate_until([request])


def test_messages_keep_system_prompts_and_the_places_of_images(tiny):
    """A benchmark's own conversation gives the tokens that the processor gives for the same template."""
    from sparsity_forcing.evaluation.answers import answer_batch

    red, blue = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    conversation = [
        {"role": "system", "content": "answer briefly"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "which digit is"},
                {"type": "image", "image": red},
                {"type": "text", "text": "and"},
                {"type": "image", "image": blue},
            ],
        },
    ]
    text = tiny.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = tiny.processor(text=[text], images=[red, blue], return_tensors="pt")
    output = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    [answer] = answer_batch(
        tiny.model, tiny.processor, [conversation], Full(), {"max_new_tokens": 4, "do_sample": False}
    )
    prompt = inputs["input_ids"].shape[1]
    assert answer.text == tiny.processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.visual_tokens) == (prompt, 18)


def test_new_tokens_stop_at_the_end_token(tiny, rows, monkeypatch):
    """With the model's own second token as end token, an answer has 2 tokens however long its neighbours are."""
    from sparsity_forcing.evaluation.answers import answer_batch
    from sparsity_forcing.models.prompts import encode_prompts, question_messages

    conversations = [question_messages(row.question, row.images) for row in rows[:4]]
    inputs = encode_prompts(tiny.processor, [rows[0].question], [rows[0].images])
    prompt = inputs["input_ids"].shape[1]
    free = tiny.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt:].tolist()
    end = next(token for token in free if token != free[0])
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [end, 9999])
    answers = answer_batch(
        tiny.model, tiny.processor, conversations, Full(), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    )
    assert answers[0].new_tokens == free.index(end) + 1
    assert all(1 <= answer.new_tokens <= NEW_TOKENS for answer in answers)


def test_text_only_questions_have_no_visual_ratio(tiny):
    from sparsity_forcing.evaluation.answers import answer_batch
    from sparsity_forcing.models.prompts import question_messages

    settings = {"max_new_tokens": 2, "do_sample": False}
    for method in METHODS.values():
        [answer] = answer_batch(
            tiny.model, tiny.processor, [question_messages("which digit is red?", [])], method, settings
        )
        assert answer.visual_token_ratio is None
        assert answer.layer_visual_ratio is None
        assert 0 < answer.token_ratio <= 1


def test_a_turned_photograph_is_shown_as_training_shows_it(tmp_path):
    """Written as a task, read back by `datasets`: upright, whoever applies the EXIF orientation."""
    import datasets

    from sparsity_forcing.evaluation.task_functions import doc_to_visual

    photograph, exif, buffer = Image.new("RGB", (80, 40)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # orientation: turn by a quarter
    photograph.save(buffer, "JPEG", exif=exif)
    row = Row("1", "test", "vqa", "what?", "it", [buffer.getvalue()])
    [task] = write_tasks([row], tmp_path / "tasks", "exact_match", NEW_TOKENS)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / f"tasks/{task.name}.parquet"), cache_dir=str(tmp_path / "cache")
    )
    [shown] = doc_to_visual(loaded["train"][0])
    assert shown.size == to_pil(row.images[0]).size == (40, 80)


def test_generation_arguments_of_tasks():
    from sparsity_forcing.evaluation.lmms_model import generation_arguments

    greedy = {"max_new_tokens": 7, "num_beams": 1, "do_sample": False}
    assert generation_arguments({}, 7) == greedy
    assert generation_arguments({"temperature": 0, "do_sample": True, "top_p": None}, 7) == greedy
    sampled = generation_arguments({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3, "until": ["."]}, 7)
    assert sampled == {"max_new_tokens": 3, "num_beams": 1, "do_sample": True, "temperature": 0.5, "top_p": 0.9}


def test_stop_strings_cut_the_answer():
    from sparsity_forcing.evaluation.lmms_model import until

    assert until("a\n\nb. c", ["\n\n", "."]) == "a\n\nb"  # a blank line is lmms-eval's filler, no stop string
    assert until("a\nb", ["\n", "."]) == "a"
    assert until("a. b", ".") == "a"
    assert until("abc", ["", "x"]) == "abc"
    assert until("abc", None) == "abc"


@pytest.mark.slow
def test_the_command_line_of_lmms_eval(tiny, rows, benchmark_tasks, tmp_path):
    """With a CPU-only torch through `python -m sparsity_forcing.evaluation`, else lmms-eval's own."""
    module = "lmms_eval" if torch.version.cuda else "sparsity_forcing.evaluation"
    task = benchmark_tasks.tasks[0]
    command = [
        *(sys.executable, "-m", module, "--model", "sparsity_forcing"),
        *("--model_args", f"pretrained={tiny.directory},p=0.6,protect_text=False,device=cpu"),
        *("--include_path", str(benchmark_tasks.directory), "--tasks", task.name, "--batch_size", "2"),
        *("--log_samples", "--output_path", str(tmp_path)),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    [log] = tmp_path.rglob(f"*_samples_{task.name}.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    expected = one_by_one(tiny, [row for row in rows if row.label == task.label], METHODS["sparse"])
    ratios = [sample["token_counts"][0]["visual_token_ratio"] for sample in samples]
    assert ratios == pytest.approx([row["visual_token_ratio"] for row in expected.values()], abs=1e-6)
