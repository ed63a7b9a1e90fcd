"""lm-evaluation-harness on an exported model, with tasks that need no download."""

import json
import math

import pytest
import torch

TEXTS = ("the whale and the ship were one at night, " * 5, "harpoon sea night " * 9)
QUESTIONS = (("the sea and the", " night", " whale ship"), ("a harp", "oon", "ist of the sea"))
TASKS = {
    "held_text": ("output_type: loglikelihood_rolling", 'doc_to_text: ""', "bits_per_byte"),
    "words": ("output_type: multiple_choice", 'doc_to_text: "{{text}}"', "acc"),
}


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {
        "held_text": [{"text": text} for text in TEXTS],
        "words": [{"text": q, "choices": list(choices), "answer": 0} for q, *choices in QUESTIONS],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, (kind, prompt, metric) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        target = '"{{text}}"' if name == "held_text" else '"{{answer}}"'
        choices = (
            "" if name == "held_text" else 'doc_to_choice: "{{choices}}"\ntarget_delimiter: ""\n'
        )
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {data}\n{kind}\ntest_split: test\n{prompt}\n"
            f"doc_to_target: {target}\n{choices}metric_list:\n  - metric: {metric}\n"
        )
    return folder


@pytest.mark.slow
def test_the_harness_measures_what_the_model_does(exported_run, task_folder):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from ttt_megatron.evaluation.by_position import evaluate_by_position
    from ttt_megatron.exchange.exported import load_exported

    def run(task, **arguments):
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(exported_run), "trust_remote_code": True, **arguments},
            tasks=[task],
            task_manager=TaskManager(include_path=str(task_folder)),
            device="cpu",
            batch_size=2,
        )

    learner, *_ = load_exported(exported_run)
    learner.eval()

    def nats(text, behind=""):
        ids = torch.tensor([256, *(behind + text).encode()])
        return evaluate_by_position(learner, [ids]).nll[0][-len(text.encode()) :].sum()

    bits = sum(nats(text) for text in TEXTS) / math.log(2) / sum(map(len, TEXTS))
    # The harness puts BOS before a whole text by itself: the tokenizer must not do so again.
    whole = run("held_text", add_bos_token=False)["results"]["held_text"]
    assert whole["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    samples = run("words")["samples"]["words"]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question, *choices = QUESTIONS[sample["doc_id"]]
        expected = [-nats(choice, behind=question) for choice in choices]
        found = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=1e-4)
