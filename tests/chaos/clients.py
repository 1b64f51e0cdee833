"""Clients that send requests all the time, and compare every text with the one that the model and the seed give."""

import contextlib
import http.client
import json
import random
import statistics
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.package import Package
from gptcore.sampling import SamplingParams
from tests.waiting import eventually

ANSWER_SECONDS = 150.0
"""A client gives up after so long without a byte."""
CALM_SECONDS = 2.0
"""All is well once every answer was right for so long."""
FAILURES_TOLD = ("unavailable", "refused", "cut", "error")
"""503 with Retry-After; no connection; one that ended in the middle; an error of the API as the reply or in it."""


class Failed(Exception):
    """A stream without a right end."""


@dataclass(frozen=True)
class Ask:
    """A request whose text depends on the model alone."""

    prompt: str
    seed: int
    new_tokens: int
    stream: bool

    @property
    def body(self) -> bytes:
        said = {"prompt": self.prompt, "seed": self.seed, "max_new_tokens": self.new_tokens, "stream": self.stream}
        return json.dumps(said | {"temperature": 1.0, "ignore_eos": True}).encode()


def asks(count: int = 24, longest: int = 24) -> list[Ask]:
    """Requests of different lengths, every other one a stream; always the same."""
    rng = random.Random(1)
    words = [" ".join(rng.choices(("one", "two", "three", "four"), k=rng.randint(1, 6))) for _ in range(count)]
    return [Ask(word, seed, rng.randint(4, longest), seed % 2 == 1) for seed, word in enumerate(words)]


def texts(package: Package, wanted: Sequence[Ask], backend: str) -> dict[Ask, str]:
    """What the engine alone answers, one request after the other."""
    engine = Engine(package, EngineSettings(slots=4, dtype="float32", backend=backend, threads=1))
    found = dict.fromkeys(wanted, "")
    for number, ask in enumerate(wanted):
        params = SamplingParams(temperature=1.0, max_new_tokens=ask.new_tokens, seed=ask.seed, ignore_eos=True)
        engine.add(Request(str(number), engine.encode(ask.prompt), params))
        while engine.busy:
            for update in engine.step():
                found[ask] += update.text
    engine.close()
    return found


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    asked: float
    answered: float
    """In seconds of the monotonic clock."""
    kind: str
    """right, wrong, silent (a stream that just ends), one of FAILURES_TOLD, or the status of anything else."""
    version: str = ""
    said: str = ""


@dataclass
class Clients:
    """So many clients at once, until the block ends. Each sends its next request as soon as it has an answer."""

    port: int
    count: int
    wanted: Sequence[Ask]
    expected: dict[str, dict[Ask, str]]
    """What each version of the model answers."""
    pause: float = 0.05
    """Seconds after which a client whose request failed tries again."""
    answers: list[Answer] = field(default_factory=list)
    """In the order in which they came."""

    def __enter__(self) -> "Clients":
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            ask = rng.choice(self.wanted)
            asked = time.monotonic()
            kind, version, said = self.answer(ask)
            self.answers.append(Answer(asked, time.monotonic(), kind, version, said))
            if kind != "right":
                self._stop.wait(self.pause)

    def answer(self, ask: Ask) -> tuple[str, str, str]:
        """(kind, version, what was said) for one request."""
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as connection:
                connection.request("POST", "/generate", ask.body)
                reply = connection.getresponse()
                content = reply.read().decode()
        except ConnectionRefusedError:
            return "refused", "", ""
        except (OSError, http.client.HTTPException) as error:
            return "cut", "", repr(error)
        if reply.status != 200:
            return failure(reply, content), "", content[:300]
        try:
            text, version = streamed(content) if ask.stream else whole(content)
        except Failed as error:
            return str(error), "", content[-300:]
        except (ValueError, LookupError) as error:
            return "wrong", "", f"{error!r} in {content[:200]!r}"
        known = self.expected.get(version)
        if known is None or text != known[ask]:
            return "wrong", version, f"{ask} {text!r}"
        return "right", version, ""

    def since(self, moment: float) -> list[Answer]:
        """The answers that came after that moment, in their order."""
        return self.answers[bisect_left(self.answers, moment, key=lambda answer: answer.answered) :]

    def await_answers(self, count: int, seconds: float = 60.0) -> None:
        """Waits until so many more answers are right."""
        begun = time.monotonic()
        eventually(
            lambda: sum(answer.kind == "right" for answer in self.since(begun)) >= count,
            f"{count} requests are answered",
            seconds,
        )

    def await_calm(self, moment: float, seconds: float = 120.0) -> float:
        """Waits until nothing fails any more. Returns after how many seconds the last failure since `moment` was."""

        def calm() -> bool:
            now = time.monotonic()
            latest = self.since(max(moment, now - CALM_SECONDS))
            return now - moment >= CALM_SECONDS and bool(latest) and {answer.kind for answer in latest} == {"right"}

        eventually(calm, f"every request is answered; lately {self.kinds(time.monotonic() - 2)}", seconds)
        failed = [answer.answered for answer in self.since(moment) if answer.kind != "right"]
        return max(failed) - moment if failed else 0.0

    def kinds(self, moment: float = 0.0) -> Counter[str]:
        return Counter(answer.kind for answer in self.since(moment))

    def latency(self, begun: float, ended: float) -> float:
        """The median seconds of right answers in that time; 0 if there are none."""
        took = [a.answered - a.asked for a in self.since(begun) if a.kind == "right" and a.answered < ended]
        return statistics.median(took) if took else 0.0


def failure(reply: http.client.HTTPResponse, content: str) -> str:
    """What kind of failure a reply is that is not 200: 503 must have the API's form and say when to come back."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error: Any = json.loads(content)["error"]
        if set(error) == {"message", "type", "param", "code"}:
            if reply.status == 503 and int(reply.getheader("retry-after", "0")) >= 1:
                return "unavailable"
            if reply.status == 504:
                return "error"
    return str(reply.status)


def whole(content: str) -> tuple[str, str]:
    """(text, version) of a reply."""
    said = json.loads(content)
    return str(said["choices"][0]["text"]), str(said["version"])


def streamed(content: str) -> tuple[str, str]:
    """(text, version) of a stream. Raises Failed: "error" if it ends with one, "silent" if it just ends."""
    events = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
    if not events or events[-1] != "[DONE]":
        with contextlib.suppress(ValueError, IndexError):
            if "error" in json.loads(events[-1]):
                raise Failed("error")
        raise Failed("silent")
    said = [json.loads(event) for event in events[:-1]]
    return "".join(choice["text"] for event in said for choice in event["choices"]), str(said[0]["version"])
