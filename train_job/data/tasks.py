"""The built-in conversations: short tasks for a very small model, each with one right answer.

They are made from a fixed seed, the same with every version of Python. An eighth of each kind's inputs (words, pairs of
numbers, facts, names) is held out by a hash. No conversation has such a task about them, so a model that answers one of
the `held_out` questions has not memorised the answer.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gptcore.errors import ConfigError, did_you_mean

CONVERSATIONS = 8000
LONGEST = 160
"""Most characters in a conversation's messages, so that most fit into 256 tokens, even of one byte each."""
TRIES = 20_000
"""Draws without a new question, after which there are none left."""

Message = dict[str, str]
"""`role` and `content`."""
Turn = tuple[str, str]
"""What the user says, and the answer."""
ROLES = ("user", "assistant")
"""Of a turn's two messages."""
T = TypeVar("T")

LISTS = (
    """
able acid also animal apple army arrow aunt autumn baby back bacon ball banana band bank basket bath beach bean
bear bed bell bench berry big bird biscuit blue board boat body bone book boot border bottle bowl box boy branch brave
bread bridge bright broom brother bucket button butter cabin cake camel camera candle candy canvas carpet carrot castle
cat chair chalk cheese cherry chicken child circle city clay clean clock cloud clown coat coffee coin comb copper corner
cotton count cousin crab cream crown cup curtain dance dawn deer desk dinner doctor dog donkey door dragon dream dress
drum duck eagle early earth east egg elbow empty engine evening eye fable face family farm feather fence fern field
finger fire fish flag flame floor flower flute fog forest fork fox friend frog fruit garden garlic gate ghost giant
ginger glass glove goat gold goose grape grass green guitar hall hammer hand happy harbour hat hazel heart hen hill
honey hook horse hotel house ice idea insect iron island ivory jacket jam jar jelly jewel juice jump jungle kettle key
king kitchen kite kitten knee knife ladder lake lamb lamp lantern large leaf lemon letter library light lily lion
little lizard lobster lunch magic mango maple market meadow melon metal milk mirror money monkey moon morning mountain
mouse music nail narrow needle nest night noise north nose number nut oak ocean office olive onion orange orchard otter
oven owl paint palace panda paper parrot party pasta peach pear pebble pen pencil pepper piano picture pillow pilot pine
planet plate plum pocket poem pond pony potato prince pumpkin puppy purple puzzle queen quick quiet rabbit radio rain
raven ribbon rice ring river road robin rocket roof room rope rose round saddle sail salad salt sand sauce school
scissors sea seed seven shadow shark sheep shell ship shirt shoe silver sister sky sleep snail snow soap sofa soup south
spider spoon spring square squirrel stable star station steam stone storm story street sugar summer sun swan table tail
tea teacher temple tent thunder tiger toast tomato tower toy train travel tree tulip tunnel turtle uncle valley velvet
village violin voice wagon walnut water wave weather west whale wheat wheel white window winter wolf wood wool yellow
young zebra zero
""",
    """
Adam Alice Amy Anna Ben Bruno Carla Clara Dan David Ella Emil Emma Eva Felix Finn Frank Grace Hanna Hugo Ida Iris Jack
Jane Jonas Julia Karl Kate Laura Leo Lena Lucy Maria Mark Max Mia Nina Noah Nora Olga Oscar Paul Peter Rosa Ruth Sam
Sara Simon Sofia Tara Theo Tina Tom Vera Victor Zoe
""",
    "black blue brown green grey pink purple red white yellow",
    "ball bike boat book cap car coat cup drum hat jacket kite lamp pen ring scarf shirt spoon toy watch",
    "bag basket bathroom box cellar cupboard drawer garden hall kitchen office shed tent",
    "apples bread cake cheese fish honey milk noodles nuts pears rice soup tea tomatoes",
)
CONSONANTS, VOWELS, ENDINGS = "bdfjlmnrstvw", "aeiou", ("", "", "l", "n", "r", "s")
"""Of made-up words."""
WORDS, NAMES, COLOURS, THINGS, PLACES, FOODS = map(str.split, LISTS)

REPEAT = ["Repeat {}.", "Say {}.", "Please repeat: {}", "Repeat after me: {}", "Can you say {}?"]
REVERSE = ["Reverse {}.", "Reverse the {kind} {}.", "Write {} backwards.", "What is {} backwards?", "Turn {} around."]
SPELL = {
    "-": ["Spell {}.", "Spell the word {}.", "How do you spell {}?", "Spell {} with dashes."],
    " ": ["Spell {} with spaces.", "Put spaces between the letters of {}."],
}
COUNT = [
    "How many times does the letter {letter} occur in {word}?",
    "How often does {letter} occur in {word}?",
    "Count the letter {letter} in {word}.",
    "How many {letter}'s are there in {word}?",
]
SORT = ["Sort {}.", "Sort the {kind} {}.", "Put {} in order.", "Put the {kind} {} in order.", "Please sort: {}"]
ADD = [
    "What is {} + {}?",
    "What is {} plus {}?",
    "Add {} and {}.",
    "How much is {} plus {}?",
    "What do {} and {} add up to?",
    "{} + {} =",
]
INTRODUCE = ["My name is {}.", "I am {}.", "Hello, I am {}.", "Hi! My name is {}.", "Please call me {}."]
RECALL = ["What is my name?", "What am I called?", "Do you remember my name?", "Tell me my name.", "Who am I?"]
SYSTEM = ["Answer briefly.", "You are a helpful assistant."]


@dataclass(frozen=True)
class Question:
    """An unseen question: a conversation up to the user's last message, and the only right answer to that."""

    kind: str
    messages: list[Message]
    answer: str


class Chance:
    """Random choices from the one method of `random.Random` whose results no version of Python changes."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest())).random

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(self._random() * limit)

    def choose(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return sorted(items, key=lambda _: self._random())


def conversations() -> list[list[Message]]:
    """All conversations in random order, each from the user's first question, or a system message, to an answer.

    Apart from that for the user's name, no question is asked twice. So any part of the list is a fair sample, and asks
    nothing that another part asks.
    """
    chance, asked = Chance("conversations"), set[str]()
    made = [_conversation(chance, KINDS[number % len(KINDS)], asked) for number in range(CONVERSATIONS)]
    return chance.shuffled(made)


def held_out(kind: str, count: int) -> list[Question]:
    """Different questions of one kind whose inputs occur in no conversation; the same ones each time.

    Raises ConfigError for an unknown kind, or if there are fewer.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"no kind of task is called {kind!r}; expected {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )
    chance, asked = Chance(f"held out, {kind}"), set[str]()
    found = []
    for number in range(count):
        try:
            *messages, answer = _messages(_turns(chance, kind, True, asked))
        except LookupError:
            raise ConfigError(
                f"there are only {number} unseen questions of the kind {kind!r}; expected {count}"
            ) from None
        found.append(Question(kind, messages, answer["content"]))
    return found


def _conversation(chance: Chance, kind: str, asked: set[str]) -> list[Message]:
    messages = _messages(_turns(chance, kind, False, asked))
    system = {"role": "system", "content": chance.choose(SYSTEM)}
    return [system, *messages] if chance.below(16) == 0 and _length([system, *messages]) <= LONGEST else messages


def _turns(chance: Chance, kind: str, held: bool, asked: set[str]) -> list[Turn]:
    """An exercise of this kind. Before its question, up to two others in some conversations."""
    turns = _exercise(chance, kind, held, asked)
    others = chance.below(3) if kind == "remember" else max(0, chance.below(10) - 7)
    for _ in range(others):
        other = _exercise(chance, chance.choose(SINGLE), held, asked)
        if _length(_messages(turns + other)) <= LONGEST:
            turns[-1:-1] = other
    return turns


def _exercise(chance: Chance, kind: str, held: bool, asked: set[str]) -> list[Turn]:
    """The turns of a task that is not yet in `asked`, with an input that is held out or not. Raises LookupError."""
    for _ in range(TRIES):
        exercise = EXERCISES[kind](chance)
        question = exercise.turns[0][0]
        if _is_held(kind, exercise.input) == held and question not in asked:
            asked.add(question)
            return exercise.turns
    raise LookupError(f"no further question of the kind {kind!r} was found")


def _is_held(kind: str, key: str) -> bool:
    return hashlib.sha256(f"{kind} {key}".encode()).digest()[0] < 32


def _messages(turns: Iterable[Turn]) -> list[Message]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]


def _length(messages: Iterable[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


# --- the kinds of task ---------------------------------------------------------------------------------------------


class Exercise(NamedTuple):
    """One task. `input` is what it is about, whatever the phrasing; equal ones are held out together."""

    input: str
    turns: list[Turn]


def _repeat(chance: Chance) -> Exercise:
    text = " ".join(_word(chance, 2, 6) for _ in range(1 + chance.below(3)))
    return Exercise(text, [(chance.choose(REPEAT).format(text), text)])


def _reverse(chance: Chance) -> Exercise:
    if chance.below(3):
        kind, text = "word", _word(chance, 3, 5)
    else:
        kind, text = "digits", "".join(chance.choose("0123456789") for _ in range(3 + chance.below(3)))
    return Exercise(text, [(chance.choose(REVERSE).format(text, kind=kind), text[::-1])])


def _spell(chance: Chance) -> Exercise:
    word, separator = _word(chance, 3, 7), chance.choose("-- ")
    return Exercise(word, [(chance.choose(SPELL[separator]).format(word), separator.join(word))])


def _count(chance: Chance) -> Exercise:
    times = chance.below(4)  # each count is as frequent, so that guessing does not pay
    while True:
        word = _word(chance, 4, 8)
        letter = chance.choose(word if times else _word(chance, 4, 8))
        if word.count(letter) == times:
            return Exercise(word, [(chance.choose(COUNT).format(letter=letter, word=word), str(times))])


def _sort(chance: Chance) -> Exercise:
    kind, items = chance.choose([("digits", "0123456789"), ("letters", "abcdefghij")])
    given = chance.shuffled(items)[: 3 + chance.below(3)]
    ordered, text = " ".join(sorted(given)), " ".join(given)
    return Exercise(ordered, [(chance.choose(SORT).format(text, kind=kind), ordered)])


def _add(chance: Chance) -> Exercise:
    a, b = chance.below(21), chance.below(21)
    return Exercise(f"{min(a, b)} {max(a, b)}", [(chance.choose(ADD).format(a, b), str(a + b))])


class Fact(NamedTuple):
    subject: str
    sentence: str
    question: str
    answer: str


def _find(chance: Chance) -> Exercise:
    fact, other = _fact(chance), _fact(chance)
    told = [fact] if chance.below(2) or fact.subject == other.subject else chance.shuffled([fact, other])
    text = " ".join(each.sentence for each in told)
    return Exercise(fact.sentence, [(f"{text} {fact.question}", fact.answer)])


def _fact(chance: Chance) -> Fact:
    name, thing, colour = _name(chance), chance.choose(THINGS), chance.choose(COLOURS)
    match chance.below(5):
        case 0:
            return Fact(name, f"{name} has a {colour} {thing}.", f"What colour is {name}'s {thing}?", colour)
        case 1:
            return Fact(name, f"{name} has a {colour} {thing}.", f"What does {name} have?", f"a {colour} {thing}")
        case 2:
            food = chance.choose(FOODS)
            return Fact(name, f"{name} likes {food}.", f"What does {name} like?", food)
        case 3:
            age = str(2 + chance.below(78))
            return Fact(name, f"{name} is {age} years old.", f"How old is {name}?", age)
        case _:
            what, place = f"{colour} {thing}", chance.choose(PLACES)
            return Fact(what, f"The {what} is in the {place}.", f"Where is the {what}?", f"in the {place}")


def _remember(chance: Chance) -> Exercise:
    name = _name(chance)
    introduction = chance.choose(INTRODUCE).format(name), f"Hello {name}!"
    return Exercise(name, [introduction, (chance.choose(RECALL), f"Your name is {name}.")])


def _word(chance: Chance, least: int, most: int) -> str:
    """A word of so many letters; every second one is made up."""
    while True:
        found = chance.choose(WORDS) if chance.below(2) else _made_up(chance, 1 + chance.below(3))
        if least <= len(found) <= most:
            return found


def _name(chance: Chance) -> str:
    return chance.choose(NAMES) if chance.below(2) else _made_up(chance, 2).capitalize()


def _made_up(chance: Chance, syllables: int) -> str:
    return "".join(chance.choose(CONSONANTS) + chance.choose(VOWELS) for _ in range(syllables)) + chance.choose(ENDINGS)


EXERCISES: dict[str, Callable[[Chance], Exercise]] = {
    "repeat": _repeat,
    "reverse": _reverse,
    "spell": _spell,
    "count": _count,
    "sort": _sort,
    "add": _add,
    "find": _find,
    "remember": _remember,
}
KINDS = (*EXERCISES,)
"""The kinds of task."""
SINGLE = KINDS[:-1]
"""Those of one turn."""
