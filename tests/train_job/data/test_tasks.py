"""The built-in conversations are the same everywhere, each answer is right, and held-out questions are new."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from gptcore.errors import ConfigError
from train_job.data.tasks import KINDS, LONGEST, Message, Question, conversations, held_out

SHA256 = "84ca682dcd2affc32bc8fc51ba69deb09962f925193e85f2ec140af4745c003c"
COUNT = 40
PATTERNS = {
    "repeat": r"(?:Repeat|Say) ([a-z ]+)\.|Can you say ([a-z ]+)\?|(?:Please repeat|Repeat after me): ([a-z ]+)",
    "reverse": r"Reverse (?:the (?:word|digits) )?(\w+)\.|Turn (\w+) around\.|(?:Write|What is) (\w+) backwards[.?]",
    "spell": r"Spell (?:the word )?(\w+)(?: with (?:dashes|spaces))?\.|How do you spell (\w+)\?"
    r"|Put spaces between the letters of (\w+)\.",
    "count": r"How (?:many times|often) does (?:the letter )?(\w) occur in (\w+)\?"
    r"|Count the letter (\w) in (\w+)\.|How many (\w)'s are there in (\w+)\?",
    "sort": r"(?:Sort|Put) (?:the (?:digits|letters) )?(\w(?: \w)+)(?: in order)?\.|Please sort: (\w(?: \w)+)",
    "add": r"(?:What is|How much is) (\d+) (?:\+|plus) (\d+)\?|(\d+) \+ (\d+) ="
    r"|Add (\d+) and (\d+)\.|What do (\d+) and (\d+) add up to\?",
    "find": r"(.+\.) ((?:What colour|What does|How old|Where) .+\?)",
    "remember": r"(?:My name is|I am|Hello, I am|Hi! My name is|Please call me) ([A-Z]\w+)\.",
}
RECALLS = {"What is my name?", "What am I called?", "Do you remember my name?", "Tell me my name.", "Who am I?"}
FACTS = {  # a question, and the fact that answers it
    r"What colour is (\w+)'s (\w+)\?": r"{0} has a (\w+) {1}\.",
    r"What does (\w+) have\?": r"{0} has (a \w+ \w+)\.",
    r"What does (\w+) like\?": r"{0} likes (\w+)\.",
    r"How old is (\w+)\?": r"{0} is (\d+) years old\.",
    r"Where is (the \w+ \w+)\?": r"(?i:{0}) is (in the \w+)\.",
}


@pytest.fixture(scope="module")
def everything() -> list[list[Message]]:
    return conversations()


def task(text: str) -> tuple[str, list[str]]:
    """The kind of the task that a message sets, and its inputs."""
    [(kind, found)] = [(kind, f) for kind, pattern in PATTERNS.items() if (f := re.fullmatch(pattern, text))]
    return kind, [group for group in found.groups() if group is not None]


def solve(earlier: Sequence[Message], text: str) -> str:
    """The right answer, computed from what the user has said."""
    if text in RECALLS:
        [name] = [f[1] for m in earlier if (f := re.fullmatch(PATTERNS["remember"], m["content"]))]
        return f"Your name is {name}."
    kind, inputs = task(text)
    match kind, inputs:
        case "repeat", [words]:
            return words
        case "reverse", [word]:
            return "".join(reversed(word))
        case "spell", [word]:
            return (" " if "spaces" in text else "-").join(word)
        case "count", [letter, word]:
            return str(sum(each == letter for each in word))
        case "sort", [items]:
            return " ".join(sorted(items.split()))
        case "add", [a, b]:
            return str(int(a) + int(b))
        case "find", [facts, question]:
            return look_up(facts, question)
        case "remember", [name]:
            return f"Hello {name}!"
    raise AssertionError(text)


def look_up(facts: str, question: str) -> str:
    [(asked, fact)] = [(f, fact) for pattern, fact in FACTS.items() if (f := re.fullmatch(pattern, question))]
    [answer] = re.findall(fact.format(*asked.groups()), facts)
    return answer


def same_input(kind: str, text: str) -> tuple[str, ...]:
    """What must not occur in both parts: the input without its phrasing."""
    inputs = task(text)[1]
    match kind:
        case "count":
            return (inputs[1],)
        case "sort":
            return tuple(sorted(inputs[0]))
        case "add":
            return tuple(sorted(inputs))
    return tuple(inputs)


def questions(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "user"]


# --- conversations ------------------------------------------------------------------------------------------------


def test_the_conversations_are_the_same_each_time_and_everywhere(everything: list[list[Message]]) -> None:
    assert everything == conversations()
    assert hashlib.sha256(json.dumps(everything).encode()).hexdigest() == SHA256


def test_there_are_thousands_of_short_ones(everything: list[list[Message]]) -> None:
    sizes = [sum(len(m["content"]) for m in messages) for messages in everything]
    assert len(everything) == 8000
    assert max(sizes) <= LONGEST
    assert 300_000 < sum(sizes) < 1_500_000
    assert all(m["content"].isascii() and m["content"] == m["content"].strip() for c in everything for m in c)


def test_roles_alternate_from_the_user_to_the_assistant(everything: list[list[Message]]) -> None:
    systems = 0
    for messages in everything:
        roles = [m["role"] for m in messages]
        systems += roles[0] == "system"
        spoken = roles[roles[0] == "system" :]
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert spoken
    assert 100 < systems < 800


def test_every_answer_is_right(everything: list[list[Message]]) -> None:
    for messages in everything:
        for number, message in enumerate(messages):
            if message["role"] == "user":
                assert messages[number + 1]["content"] == solve(messages[:number], message["content"]), messages


def test_no_question_is_asked_twice(everything: list[list[Message]]) -> None:
    asked = Counter(text for messages in everything for text in questions(messages) if text not in RECALLS)
    assert set(asked.values()) == {1}


def test_any_tail_is_a_fair_sample(everything: list[list[Message]]) -> None:
    tail = everything[-800:]
    kinds = Counter(task(text)[0] for messages in tail for text in questions(messages) if text not in RECALLS)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 70
    assert 400 < sum(len(questions(messages)) == 1 for messages in tail) < 700


def test_guessing_how_often_a_letter_occurs_does_not_pay(everything: list[list[Message]]) -> None:
    turns = [(q["content"], a["content"]) for messages in everything for q, a in pairwise(messages)]
    counts = Counter(answer for question, answer in turns if re.fullmatch(PATTERNS["count"], question))
    assert set(counts) == {"0", "1", "2", "3"}
    assert max(counts.values()) < 0.35 * counts.total()


# --- held-out questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_questions_are_right_and_different(kind: str) -> None:
    found = held_out(kind, COUNT)
    assert found == held_out(kind, COUNT)
    assert held_out(kind, 5) == found[:5]
    assert len({json.dumps(question.messages) for question in found}) == len(found) == COUNT
    for question in found:
        *earlier, last = question.messages
        assert (question.kind, last["role"]) == (kind, "user")
        assert question.answer == solve(earlier, last["content"])
        assert last["content"] in RECALLS if kind == "remember" else task(last["content"])[0] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_no_conversation_has_the_input_of_a_held_out_question(kind: str, everything: list[list[Message]]) -> None:
    def inputs(messages: Sequence[Message]) -> set[tuple[str, ...]]:
        texts = [text for text in questions(messages) if text not in RECALLS]
        return {same_input(kind, text) for text in texts if task(text)[0] == kind}

    known = set().union(*map(inputs, everything))
    for question in held_out(kind, COUNT):
        assert known.isdisjoint(inputs(question.messages))


def test_too_many_questions_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are only \d+ unseen questions of the kind 'add'; expected 100000"):
        held_out("add", 100_000)
    with pytest.raises(ConfigError, match=r"called 'ad'; expected repeat, .*\. Did you mean 'add'\?"):
        held_out("ad", 1)


def test_a_question_is_not_changed() -> None:
    [question] = held_out("add", 1)
    assert isinstance(question, Question)
    with pytest.raises(AttributeError):
        question.answer = "5"  # type: ignore[misc]
