"""Conversations in files become rows of tokens: their forms, their answers, packing, and lines that do not fit."""

import json
import random
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gptcore.chat import chat_template, chat_tokenizer
from gptcore.errors import ConfigError, CorpusError
from gptcore.loss import IGNORE
from gptcore.tokenizer import Tokenizer, load_tokenizer
from train_job.config import build_config
from train_job.data import pieces
from train_job.data.conversation_tokens import ANSWER, FIRST, ID
from train_job.data.conversations import CONVERSATION, messages_of
from train_job.data.corpus import Corpus, open_corpus, split, without
from train_job.data.inputs import prepare_inputs
from train_job.data.packing import ConversationBatches, all_batches, best_fit, pack
from train_job.data.shards import TokenSet, prepare

ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 ≠ 5"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer(load_tokenizer("bytes", None))


def some(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns, some behind a system prompt, of different lengths."""
    choose = random.Random(seed)
    made = []
    for number in range(count):
        turns = [
            {
                "role": role,
                "content": f"{role} {number} " + "é<|im_end|> "[: choose.randrange(12)] * choose.randrange(4),
            }
            for role in ("user", "assistant") * choose.randint(1, 3)
        ]
        made.append([SYSTEM] * choose.randrange(2) + turns)
    return made


def written(folder: Path, conversations: list[list[dict[str, str]]], name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def opened(path: Path) -> Corpus:
    return open_corpus(str(path), CONVERSATION, path.parent / "cache")


def said(corpus: Corpus) -> list[Any]:
    return [messages_of(document) for document in corpus.documents()]


SHAREGPT = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4 ≠ 5"}]}
PAIR = {"prompt": "2 + 2?", "completion": "4 ≠ 5"}
PAIR_OF_LISTS = {"prompt": [ASKED], "completion": [ANSWERED]}


@pytest.mark.parametrize(
    "record", [{"messages": [ASKED, ANSWERED], "id": 7}, SHAREGPT, PAIR, PAIR_OF_LISTS], ids=lambda r: next(iter(r))
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_conversation_may_be_in_any_of_the_usual_forms(record: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([record] * 5), path, row_group_size=2)
    elif suffix == "json":
        path.write_text(json.dumps([record] * 5, indent=1))
    else:
        path.write_text(f"{json.dumps(record)}\n\n" * 5)
    corpus = opened(path)
    assert said(corpus) == [[ASKED, ANSWERED]] * 5
    train, validation = split(corpus, 0.3)
    assert len(said(train)) + len(said(validation)) == 5


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "hello"}, "no field 'messages', nor 'conversations', nor 'prompt' with 'completion'; there are text"),
        ([ASKED], "expected an object with the field 'messages', found list"),
        ({"messages": "hello"}, "field 'messages' is str, expected a list of messages"),
        ({"messages": []}, "field 'messages' is an empty list"),
        ({"messages": [ASKED]}, "no message is an answer of the assistant; expected at least one"),
        ({"messages": [ASKED, "4"]}, r"messages\[1\] is str, expected an object"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\] has the role 'usr'.* Did you mean 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has the role 'tool'; expected system, user"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no 'role'; there are content"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, r"the content of messages\[1\] is empty"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"the content of messages\[0\] is list, expected text"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]},
            r"the content of messages\[1\] has half of a surrogate pair",
        ),
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, r"the weight of messages\[1\] is 0\.5; expected 0 .* or 1"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] has no 'content'"),
        ({"prompt": "x"}, "no field 'messages'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(record: Any, problem: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path, some(3))
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(CorpusError, match=rf"chats\.jsonl, line 4: {problem}"):
        prepare(opened(path), tokenizer, tmp_path)


def test_a_row_of_parquet_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    rows = [PAIR, PAIR, PAIR | {"completion": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    with pytest.raises(CorpusError, match=r"chats\.parquet, row 2: the content of completion\[0\] is empty"):
        opened(path)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no system role') }}{% endif %}"
    path = written(tmp_path, [[ASKED, ANSWERED], [SYSTEM, ASKED, ANSWERED]])
    strict += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(CorpusError, match=r"line 2: the model's chat template refuses the messages: no system role"):
        prepare(opened(path), replace(tokenizer, chat_template=strict), tmp_path)


def test_other_files_beside_conversations_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    written(folder, some(2))
    (folder / "README.md").write_text("What these are.")
    corpus = open_corpus(str(folder), CONVERSATION, tmp_path / "cache")
    assert len(said(corpus)) == 2
    assert [left.name for left in corpus.left_out] == ["README.md"]
    with pytest.raises(CorpusError, match="is text; expected conversations in JSON lines, JSON or Parquet"):
        opened(folder / "README.md")


def test_validation_never_has_a_conversation_of_the_training_split(tmp_path: Path) -> None:
    path = written(tmp_path, [*some(40), *some(20)])  # a half of them twice
    train, validation = split(opened(path), 0.25)
    before = len(said(validation))
    validation, shared = without(validation, train)
    known = {json.dumps(messages) for messages in said(train)}
    assert shared == before - len(said(validation)) > 0
    assert not known & {json.dumps(messages) for messages in said(validation)}


def test_the_built_in_conversations_are_split_between_two_of_them() -> None:
    corpus = open_corpus("builtin-chat")
    train, validation = split(corpus, 0.1)
    assert said(train) + said(validation) == said(corpus)
    assert 0.08 < len(said(validation)) / len(said(corpus)) < 0.12


# --- tokens ---


def words(tokens: TokenSet) -> np.ndarray:
    return tokens.read(0, tokens.num_tokens).astype(np.uint32)


def test_only_the_answers_and_what_ends_them_are_targets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    conversations = some(100)
    stream = words(prepare(opened(written(tmp_path, conversations)), tokenizer, tmp_path))
    starts = np.flatnonzero(stream & FIRST)
    assert len(starts) == 100
    template = chat_template(tokenizer)
    assert template is not None
    for messages, own in zip(conversations, np.split(stream, starts[1:]), strict=True):
        assert (own & ID).tolist() == template.encode(messages, generate=False)
        spans = [[*group] for answered, group in groupby(own, lambda word: bool(word & ANSWER)) if answered]
        answers = ["".join(tokenizer.spelling(int(word & ID)) for word in span) for span in spans]
        expected = [m["content"] for m in messages if m["role"] == "assistant"]
        typed = ["".join(map(tokenizer.spelling, tokenizer.encode(text))) for text in expected]
        assert answers == [f"{text}<|im_end|>" for text in typed]


def test_an_answer_with_weight_0_is_read_but_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    skipped = ANSWERED | {"weight": 0}
    tokens = prepare(opened(written(tmp_path, [[ASKED, skipped, ASKED, ANSWERED]])), tokenizer, tmp_path)
    stream = words(tokens)
    spans = [[*group] for answered, group in groupby(stream, lambda word: bool(word & ANSWER)) if answered]
    assert len(spans) == 1
    assert (stream[-1 - len(spans[0]) : -1] == spans[0]).all()
    assert tokens.num_bytes == len("4 ≠ 5".encode())


def test_a_conversation_without_an_answer_to_learn_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wrong = [ASKED, ANSWERED | {"weight": 0}]
    tokens = prepare(opened(written(tmp_path, [wrong, [ASKED, ANSWERED], wrong])), tokenizer, tmp_path)
    assert tokens.num_documents == 1
    assert sum(map(bool, words(tokens) & FIRST)) == 1


def test_what_is_counted_are_the_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = prepare(opened(written(tmp_path, [[SYSTEM, ASKED, ANSWERED]] * 3)), tokenizer, tmp_path)
    assert (tokens.num_documents, tokens.num_bytes) == (3, 3 * len("4 ≠ 5".encode()))
    assert tokens.num_targets == 3 * (len("4 ≠ 5".encode()) + 1)


def test_shards_of_another_template_are_other_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(written(tmp_path, some(5)))
    assert tokenizer.chat_template
    other = replace(tokenizer, chat_template=tokenizer.chat_template.replace("\n", " ", 1))
    assert prepare(corpus, tokenizer, tmp_path).fingerprint != prepare(corpus, other, tmp_path).fingerprint


# --- rows ---


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), size=st.integers(20, 40))
def test_packing_holds_every_item_once_and_no_row_too_many(lengths: list[int], size: int) -> None:
    order, borders = best_fit(np.array(lengths), size)
    rows = [order[start:end] for start, end in pairwise(borders)]
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert max(sums) <= size
    fewest = -(-sum(lengths) // size)
    assert len(rows) <= 11 / 9 * fewest * 2  # it is near the best: no two rows fit into one
    assert all(a + b > size for n, a in enumerate(sums) for b in sums[n + 1 :])


def epoch(batches: ConversationBatches, world_size: int) -> list[tuple[int, ...]]:
    """The targets of each row of one epoch, as every rank sees them."""
    seen = []
    for step in range(len(batches.rows)):
        for rank in range(world_size):
            _, y, _ = batches.batch(step, rank, world_size)
            seen += [tuple(row[row != IGNORE].tolist()) for row in y]
    return seen


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_has_every_answer_once_in_an_order_of_the_seed(
    world_size: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokens = prepare(opened(written(tmp_path, some(60))), tokenizer, tmp_path)
    one, other = (ConversationBatches(tokens, 300, 4, seed) for seed in (1, 2))
    seen = epoch(one, world_size)
    assert seen == epoch(one, 1)
    rows = len(one.rows)
    for start in range(0, 4 * rows, rows):  # four epochs, since a batch has four rows
        assert sorted(seen[start : start + rows]) == sorted(epoch(other, 1)[:rows])
    assert seen[:rows] != epoch(other, 1)[:rows]
    assert sum(map(len, seen[:rows])) == tokens.num_targets
    for step in range(5):
        assert one.targets(step) == int((one.batch(step)[1] != IGNORE).sum())


def test_a_row_holds_whole_conversations_that_begin_at_position_0(tmp_path: Path, tokenizer: Tokenizer) -> None:
    conversations = some(30)
    tokens = prepare(opened(written(tmp_path, conversations)), tokenizer, tmp_path)
    template = chat_template(tokenizer)
    assert template is not None
    expected = sorted(tuple(template.encode(messages, generate=False)[:-1]) for messages in conversations)
    found = []
    for x, _, positions in all_batches(tokens, 400, 7):
        for ids, at in zip(x.tolist(), positions.tolist(), strict=True):
            borders = [n for n, place in enumerate(at) if place == 0] + [len(at)]
            found += [tuple(ids[a:b]) for a, b in pairwise(borders)]
    assert sorted(text for text in found if len(text) > 1) == expected  # spare tokens are alone


def test_a_conversation_longer_than_a_row_is_cut_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = [ASKED, {"role": "assistant", "content": "x" * 500}]
    tokens = prepare(opened(written(tmp_path, [*some(5), long])), tokenizer, tmp_path)
    assert (pack(tokens, 300).cut, pack(tokens, 900).cut) == (1, 0)
    for length in (300, 900):
        assert sum(int((y != IGNORE).sum()) for _, y, _ in all_batches(tokens, length, 2)) == tokens.num_targets


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_judge_by_every_answer_in_as_many_batches(world_size: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = prepare(opened(written(tmp_path, some(20))), tokenizer, tmp_path)
    shares = [[*all_batches(tokens, 300, 2, rank, world_size)] for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    assert sum(int((y != IGNORE).sum()) for batches in shares for _, y, _ in batches) == tokens.num_targets


# --- a run's inputs ---


def test_a_run_learns_its_vocabulary_from_what_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, [[ASKED, {"role": "assistant", "content": f"the number is {n}"}] for n in range(400)])
    settings = dict(objective="chat", data=str(path), cache_dir=str(tmp_path), tokenizer="bpe:270", context_length=64)
    inputs = prepare_inputs(build_config(settings))
    assert inputs.tokenizer.vocab_size == 272
    assert not any("role" in inputs.tokenizer.spelling(token) for token in range(256, 270))
    assert any("400 conversations" not in note and "are answers" in note for note in inputs.notes)
    assert inputs.model.vocab_size == 320


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"data": "shakespeare"}, "shakespeare is text; with objective chat, expected conversations"),
        ({"stride": 3}, "stride has no effect with objective chat"),
        ({"document_separator": "x"}, "document_separator has no effect with objective chat"),
        ({"objective": "text", "data": "builtin-chat"}, "builtin-chat holds conversations; expected objective chat"),
        ({"objective": "talk"}, "objective is 'talk'; expected text, chat"),
    ],
)
def test_settings_that_do_not_fit_the_objective_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_config({"objective": "chat"} | settings)


def test_a_preset_for_text_may_be_used_for_chat() -> None:
    assert build_config({"preset": "story", "objective": "chat"}).stride is None


def test_too_few_conversations_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [[ASKED, ANSWERED]] * 30)
    with pytest.raises(CorpusError, match="every conversation for validation is in the training split too: 3;"):
        prepare_inputs(build_config(dict(objective="chat", data=str(path), tokenizer="bytes", cache_dir=str(tmp_path))))


def test_pieces_of_a_large_file_hold_whole_conversations(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, some(50))
    whole = words(prepare(opened(path), tokenizer, tmp_path / "whole"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    corpus = open_corpus(str(path), CONVERSATION, tmp_path / "other")
    assert len(corpus.pieces) > 3
    assert np.array_equal(words(prepare(corpus, tokenizer, tmp_path / "parts")), whole)
