"""The judge: names an answer or nothing, is asked once, and what it says moves the judged column alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from agevlm.evaluation.judge import Judge, judge_prompt, judge_rows, labels_of, read_reply, score_judged
from agevlm.evaluation.registry import BENCHMARKS
from builders import tiny_tokenizer


POPE, CVBENCH = BENCHMARKS["pope"]["paper"], BENCHMARKS["cvbench"]["paper"]
OCRBENCH, HALLUSION = BENCHMARKS["ocrbench"]["paper"], BENCHMARKS["hallusionbench"]["official"]


class Scripted:
    """A judge that replies what it is told."""

    def __init__(self, *replies: str):
        self.replies, self.asked = list(replies), []

    def ask(self, prompts, progress=True):
        self.asked += prompts
        return [self.replies.pop(0) for _ in prompts]


def pope_rows(*golds):
    return [{"id": str(i), "question": f"Is there a cat {i}?", "answer": gold, "category": "random"}
            for i, gold in enumerate(golds)]  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("B", "B"), ("b.", "B"), (" (B) ", "B"), ("None", "none"), ("B or C", None), ("The answer is B", None),
     ("", None), ("Z", None), ("NoneB", None), ("Sure! I'd say", None)],
)  # fmt: skip
def test_replies_are_labels_or_nothing(reply, expected):
    assert read_reply(reply, ("A", "B", "none")) == expected


@given(st.text())
def test_any_reply_is_a_label_or_nothing(reply):
    assert read_reply(reply, ("yes", "no", "none")) in {"yes", "no", "none", None}


def test_closed_questions_keep_the_right_answer_from_the_judge():
    row = {"id": "0", "prompt": "Which? (A) 7391 (B) 5280", "question": "Which?", "choices": ["7391", "5280"],
           "answer": "(B)"}  # fmt: skip
    prompt = judge_prompt(CVBENCH, row, "the first one")
    assert "the first one" in prompt and "A, B, none" in prompt
    assert prompt == judge_prompt(CVBENCH, {**row, "answer": "(A)"}, "the first one")
    free = {"id": "0", "dataset": "x", "question": "What?", "question_type": "x", "answer": ["EXIT"]}
    assert "EXIT" in judge_prompt(OCRBENCH, free, "exit") and labels_of(OCRBENCH, free)[0] == "correct"


def test_nonsense_is_unjudged_and_wrong_and_counted():
    rows = pope_rows("yes", "yes", "no", "no")
    outputs = ["It sits there.", "Yes", "", "No"]
    judge = Scripted("yes", "I cannot tell", "no")
    lines = judge_rows(judge, POPE, rows, outputs, progress=False)
    assert len(judge.asked) == 3, "an empty answer needs no judge"
    assert [line["label"] for line in lines] == ["yes", None, "none", "no"]
    parsed = [POPE.parse(row, output) for row, output in zip(rows, outputs, strict=True)]
    judged = score_judged(POPE, rows, parsed, [line["label"] for line in lines])
    assert judged["accuracy"] == 50 and judged["unjudged"] == 25
    assert judged["agreement"] == 100 and judged["agreement_n"] == 1
    assert judged["rule_then_judge"]["accuracy"] == 75 and judged["rule_then_judge"]["share_judged"] == 50
    assert judged["intervals"]["accuracy"][0] <= 50 <= judged["intervals"]["accuracy"][1]


def test_a_perfect_reader_gives_the_rules_metrics_and_one_that_disagrees_a_lower_agreement():
    rows = pope_rows("yes", "no", "no", "yes")
    parsed = ["yes", "yes", "no", "no"]
    judged = score_judged(POPE, rows, parsed, parsed)
    expected = POPE.score(rows, parsed)
    assert {key: judged[key] for key in expected} == expected and judged["agreement"] == 100
    assert score_judged(POPE, rows, parsed, ["yes"] * 4)["agreement"] == 50


def test_free_answers_are_right_if_the_judge_says_so():
    rows = [{"id": str(i), "dataset": "x", "question": "What?", "question_type": "x", "answer": ["EXIT"]}
            for i in range(3)]  # fmt: skip
    judged = score_judged(OCRBENCH, rows, ["e x i t", "exit", "way in"], ["correct", "correct", "incorrect"])
    assert judged["final"] == 2


def test_unclear_is_right_where_hallusionbench_has_no_picture():
    row = {"id": "0", "category": "VS", "subcategory": "chart", "set_id": "0", "figure_id": "0", "question_id": "0",
           "question": "?", "gt_answer": "1", "gt_answer_details": "It is."}  # fmt: skip
    rows = [row, {**row, "id": "1", "figure_id": "1"}]
    judged = score_judged(HALLUSION, rows, [None, None], ["unclear", "unclear"])
    assert judged["aAcc"] == 50
    assert score_judged(HALLUSION, rows, [None, None], [None, None])["aAcc"] == 0, "nonsense is not unclear"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random chat model: its replies are nonsense."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_model_judges_the_same_again_and_asks_once(chat_model, tmp_path, monkeypatch):
    rows, outputs = pope_rows("yes", "no", "no"), ["Perhaps", "Yes", "No way"]
    judge = Judge(chat_model, tmp_path)
    lines = judge_rows(judge, POPE, rows, outputs, progress=False)
    assert [line["label"] for line in lines] == [None] * 3, "random weights say nothing"
    assert all(isinstance(line["reply"], str) for line in lines)
    path = tmp_path / "replies.0.jsonl"
    assert len([json.loads(line) for line in path.open(encoding="utf-8")]) == 3
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut o')
    again = Judge(chat_model, tmp_path)
    monkeypatch.setattr(again, "_generate", None)
    assert judge_rows(again, POPE, rows, outputs, progress=False) == lines


def test_what_is_no_chat_model_is_refused(chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"missing is neither a folder nor the id of a repository"):
        Judge(str(tmp_path / "missing"), tmp_path)
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM.from_pretrained(chat_model).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no chat template"):
        Judge(str(tmp_path / "base"), tmp_path)
