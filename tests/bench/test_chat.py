"""bench.chat judges answers by the text that is expected, and says what model it cannot ask."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from bench import chat
from bench.weights import random_package
from gptcore.package import Package, open_package
from gptcore.parameters import SamplingParams
from gptcore.sampling import generate_text
from tests.open_tokenizers import publish, write_tokenizer
from train_job.data.tasks import KINDS, Question, held_out

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Random weights with a chat template."""
    root = tmp_path_factory.mktemp("talker")
    folder = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "model", 512, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return open_package(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Random weights without one."""
    return random_package(tmp_path_factory.mktemp("base") / "package", "quick", 400)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[list[str]], dict[str, Any]]:
    """The cells of the table, and the report."""
    assert chat.main([*argv]) == 0
    *table, report = capsys.readouterr().out.splitlines()
    return [line.split() for line in table], json.loads(report)


def test_a_random_model_and_its_base_answer_nothing(
    talker: Package, base: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    table, report = run(capsys, str(talker.path), "--base", str(base.path), "--count", "2", "--dtype", "float32")
    assert table[0] == ["kind", "exact", "base", "ended"]
    assert [row[0] for row in table[1:]] == [*KINDS, "all"] == [*report["kinds"]]
    assert all(row[1:3] == ["0.0%", "0.0%"] for row in table[1:])
    assert all(row["exact"] == row["base_exact"] == 0 for row in report["kinds"].values())
    assert (report["bench"], report["count"], report["new_tokens"]) == ("chat", 2, 64)


def test_right_answers_count_and_others_do_not(
    talker: Package, base: Package, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(package: Package, questions: Sequence[Question], *_: str) -> list[chat.Answer]:
        if package.path == base.path:
            return [chat.Answer(f"{q.answer}." if q.kind == "add" else q.answer, True) for q in questions]
        return [chat.Answer(f" {q.answer}\n" if q.kind != "sort" else "", q.kind != "sort") for q in questions]

    monkeypatch.setattr(chat, "ask", ask)
    table, report = run(capsys, str(talker.path), "--base", str(base.path), "--count", "4")
    rows = {name: cells for name, *cells in table}
    assert rows["sort"] == ["0.0%", "100.0%", "0.0%"]
    assert rows["add"] == ["100.0%", "0.0%", "100.0%"]
    assert rows["spell"] == ["100.0%", "100.0%", "100.0%"]
    assert rows["all"] == ["87.5%", "87.5%", "87.5%"]
    table, report = run(capsys, str(talker.path), "--count", "4")
    assert table[-1] == ["all", "87.5%", "-", "87.5%"]
    assert report["base"] is None
    assert report["kinds"]["sort"] == {"exact": 0, "ended": 0}


def test_a_base_continues_the_plain_text_with_a_line(base: Package) -> None:
    questions = [question for kind in KINDS for question in held_out(kind, 1)]
    model, params = base.load_model(), SamplingParams(chat.NEW_TOKENS, temperature=0, stop=("\n",))
    texts = ["".join(f"{message['content']}\n" for message in question.messages) for question in questions]
    expected = [generate_text(model, base.tokenizer, text, params) for text in texts]
    assert [answer.text for answer in chat.ask(base, questions, "float32", "cpu")] == expected


def test_a_model_without_a_template_is_refused(base: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(base.path), "--count", "1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: {base.path} has no chat template; expected a model trained with --objective chat"


def test_more_questions_than_there_are_are_refused(
    base: Package, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "KINDS", ("add",))
    assert chat.main([str(base.path), "--count", "100000"]) == 2
    assert "of the kind 'add'; expected 100000" in capsys.readouterr().err
