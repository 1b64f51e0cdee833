"""Votes on answers: what `POST /v1/feedback` takes, and the files that it leaves."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gptcore.chat import CHATML
from gptcore.errors import ConfigError, QueueFull
from gptcore.files import write_file
from serve_app.feedback import FILE_BYTES, FeedbackLog
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.running import running
from train_job.data.conversations import conversation_text

STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + CHATML
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "6"}
Serve = Callable[..., httpx2.Client]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("feedback")
    made = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "talker", 512, "llama", 256)
    (made / "chat_template.jinja").write_text(STRICT)
    return made


@pytest.fixture
def serve(folder: Path, package: Any) -> Iterator[Serve]:
    """Starts a service with votes in a folder, and returns its client."""
    opened: list[Any] = []

    def start(**settings: Any) -> httpx2.Client:
        models = (f"talker={folder}", f"tiny={package.path}")
        context = running(ServeSettings(**{"models": models, "dtype": "float32"} | settings))
        service = context.__enter__()
        opened.append(context)
        return httpx2.Client(base_url=service.url)

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def vote(client: httpx2.Client, **changes: Any) -> httpx2.Response:
    body = {"id": "chatcmpl-1", "model": "talker", "messages": [QUESTION, ANSWER], "score": 1} | changes
    return client.post("/v1/feedback", json=body)


def kept(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def learned(record: dict[str, Any]) -> list[str]:
    """The answers of a kept vote that training learns."""
    text = conversation_text(record)
    messages = json.loads(text) if text else []
    return [one["content"] for one in messages if one["role"] == "assistant" and one.get("weight", 1)]


def test_a_vote_on_an_answer_is_kept_with_the_conversation_and_trains(serve: Serve, tmp_path: Path) -> None:
    client = serve(feedback=str(tmp_path / "votes"))
    openai_client = openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="unused")
    reply = openai_client.chat.completions.create(model="talker", messages=[QUESTION], max_tokens=5, seed=1)  # type: ignore[list-item]
    answer = {"role": "assistant", "content": reply.choices[0].message.content or "?"}
    fingerprint = reply.system_fingerprint
    sent = vote(client, id=reply.id, messages=[QUESTION, answer], system_fingerprint=fingerprint)
    assert (sent.status_code, sent.json()) == (200, {"id": reply.id, "object": "feedback", "score": 1})
    (record,) = kept(tmp_path / "votes")
    assert record["messages"] == [QUESTION, answer]
    assert (record["id"], record["score"], record["model"]) == (reply.id, 1, fingerprint)
    assert learned(record) == [answer["content"]]
    name, version = str(fingerprint).split("/")
    counted = f'gpt_feedback_total{{model="{name}",score="1",version="{version}"}} 1.0'
    assert counted in client.get("/metrics").text
    vote(client, id=reply.id, messages=[QUESTION, answer], system_fingerprint=fingerprint, better="5")
    assert counted in client.get("/metrics").text  # one answer, one vote


def test_only_the_answer_voted_on_is_learned_and_a_bad_one_never(serve: Serve, tmp_path: Path) -> None:
    client = serve(feedback=str(tmp_path))
    again = {"role": "user", "content": "Are you sure?"}
    sure = {"role": "assistant", "content": "Yes."}
    talk = [QUESTION, ANSWER, again, sure]
    vote(client, id="good", messages=talk)
    vote(client, id="bad", messages=talk, score=-1)
    vote(client, id="better", messages=talk, score=-1, better="No, it is 5.")
    good, bad, better = kept(tmp_path)
    assert learned(good) == ["Yes."]
    assert learned(bad) == []
    assert learned(better) == ["No, it is 5."]
    assert better["answer"] == "Yes."


def test_the_last_of_several_votes_on_an_answer_counts(serve: Serve, tmp_path: Path) -> None:
    client = serve(feedback=str(tmp_path))
    vote(client)
    vote(client, id="another")
    vote(client, score=-1)
    assert [(record["id"], record["score"]) for record in kept(tmp_path)] == [("another", 1), ("chatcmpl-1", -1)]


def test_the_system_prompt_of_the_service_is_part_of_the_conversation(
    folder: Path, serve: Serve, tmp_path: Path
) -> None:
    place = tmp_path / "votes"
    free = shutil.copytree(folder, tmp_path / "free")
    (free / "chat_template.jinja").write_text(CHATML)
    client = serve(models=(f"talker={free}",), feedback=str(place), system_prompt="Be brief.")
    assert vote(client).status_code == 200
    (record,) = kept(place)
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_service_without_a_place_for_votes_keeps_none_and_says_so(serve: Serve, tmp_path: Path) -> None:
    client = serve()
    error = vote(client).json()["error"]
    assert (error["code"], "GPT_FEEDBACK" in error["message"]) == ("feedback_off", True)
    assert client.get("/models").json()["feedback"] is False


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"score": 5}, "score", "score is 5"),
        ({"score": 0}, "score", "score is 0"),
        ({"messages": [ANSWER, QUESTION]}, "messages", "messages[1].role is 'user'; expected 'assistant'"),
        ({"messages": [QUESTION]}, "messages", "at least 2"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n"}]}, "messages", "messages[1] has an empty"),
        ({"messages": [QUESTION, {"role": "robot", "content": "x"}]}, "messages", "messages[1].role"),
        ({"messages": [ANSWER, ANSWER]}, "messages", "a user begins"),
        ({"better": "  "}, "better", "better is an empty text"),
        ({"id": "two words"}, "id", "id is"),
        ({"id": ""}, "id", "id is"),
        ({"model": "talkr"}, "model", "talker"),
        ({"model": "tiny"}, "model", "no chat template"),
        ({"stars": 5}, "stars", "there is no field"),
    ],
)
def test_a_vote_that_does_not_fit_is_refused_and_not_kept(
    serve: Serve, tmp_path: Path, changes: dict[str, Any], param: str, said: str
) -> None:
    client = serve(feedback=str(tmp_path / "votes"))
    reply = vote(client, **changes)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404)
    assert error["param"] == param
    assert said in error["message"]
    assert kept(tmp_path / "votes") == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a store's own error")])
def test_a_full_disk_is_an_error_of_the_service_and_earlier_votes_stay(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    client = serve(feedback=str(tmp_path))
    vote(client, id="first")

    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr("serve_app.feedback.write_file", full)
    reply = vote(client, id="second")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "feedback_unavailable")
    monkeypatch.undo()
    vote(client, id="third")
    assert [record["id"] for record in kept(tmp_path)] == ["first", "third"]


def record(number: int, size: int = 0) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", "content": "x" * size}], "id": str(number), "answer": "x"}


def test_files_rotate_and_the_oldest_are_deleted(tmp_path: Path) -> None:
    other = tmp_path / "mine.jsonl"
    other.write_text("{}\n")
    log = FeedbackLog(str(tmp_path), 3 * FILE_BYTES)
    for number in range(20):
        log.add(record(number, FILE_BYTES // 2 - 1000))
        sizes = [file.stat().st_size for file in tmp_path.glob("2*.jsonl")]
        assert max(sizes) <= FILE_BYTES
        assert sum(sizes) <= 3 * FILE_BYTES
    numbers = sorted(int(one["id"]) for one in kept(tmp_path) if one)
    assert numbers == list(range(numbers[0], 20))
    assert len(numbers) >= 4
    assert other.exists()


def test_a_file_that_was_edited_moved_or_deleted_is_not_written_again(tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path / "votes"), 10 * FILE_BYTES)
    log.add(record(1))
    (file,) = (tmp_path / "votes").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("")
    log.add(record(2))
    assert file.read_text() == ""
    assert [one["id"] for one in kept(tmp_path / "votes")] == ["2"]
    shutil.rmtree(tmp_path / "votes")
    log.add(record(3))
    assert [one["id"] for one in kept(tmp_path / "votes")] == ["3"]


def test_a_vote_larger_than_a_file_is_kept_and_counts(tmp_path: Path) -> None:
    log = FeedbackLog(str(tmp_path), 3 * FILE_BYTES)
    for number in range(4):
        log.add(record(number, 2 * FILE_BYTES))
    assert [one["id"] for one in kept(tmp_path)] == ["3"]


def test_votes_beyond_those_that_may_wait_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, full = FeedbackLog(str(tmp_path), 10 * FILE_BYTES), threading.Event()
    write = write_file
    monkeypatch.setattr("serve_app.feedback.MOST_WAITING", 2)
    monkeypatch.setattr("serve_app.feedback.write_file", lambda *args: (full.wait(60), write(*args)))

    async def vote_thrice() -> None:
        waiting = [asyncio.create_task(log.keep(record(number))) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await log.keep(record(2))
        full.set()
        await asyncio.gather(*waiting)

    asyncio.run(vote_thrice())
    assert [one["id"] for one in kept(tmp_path)] == ["0", "1"]


def test_replicas_share_a_place(tmp_path: Path) -> None:
    logs = [FeedbackLog(str(tmp_path), 10 * FILE_BYTES) for _ in range(3)]
    for number in range(9):
        logs[number % 3].add(record(number))
    assert sorted(one["id"] for one in kept(tmp_path)) == [str(number) for number in range(9)]


def test_votes_go_to_any_store_that_has_a_url() -> None:
    import fsspec

    log = FeedbackLog("memory://votes/of/gpt", 10 * FILE_BYTES)
    log.add(record(1))
    log.add(record(2))
    store = fsspec.filesystem("memory")
    (file,) = store.ls("/votes/of/gpt", detail=False)
    assert [json.loads(line)["id"] for line in store.cat_file(file).splitlines()] == ["1", "2"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file" / "votes"), "nowhere://votes"):
        with pytest.raises(ConfigError, match=r"feedback is .*, which cannot be written"):
            FeedbackLog(place, 10 * FILE_BYTES)
