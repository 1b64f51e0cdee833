"""The tokenizers of open models encode and decode as transformers does, stream what they decode, and stay the same."""

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gptcore.engine import Engine, EngineSettings
from gptcore.engine.continuation import Continuation
from gptcore.engine.interface import FinishReason, Request
from gptcore.errors import PackageError, TokenizerError
from gptcore.generate import main
from gptcore.hf_tokenizer import LINE_SPLITTERS, encoding_of
from gptcore.package import open_package, save_package
from gptcore.sampling import SamplingParams, generate_text
from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer, read_tokenizer, save_tokenizer
from tests.chance import examples, times
from tests.open_tokenizers import (
    BYTE_LEVEL,
    KINDS,
    QWEN_PLAIN,
    QWEN_RANKS,
    TEXT,
    fuzzed,
    publish,
    qwen_ranks,
    split,
    write_tokenizer,
)

FUZZED, MANY, MOST = 2_000, 20_000, 100_000
"""Texts in `make test`, in `make test-slow` and in `make fuzz`."""
LEARNED = tuple(kind for kind in KINDS if kind != "qwen3")
BYTE_FALLBACK = ("llama2", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of tokenizer; skips Qwen's where its vocabulary is absent."""
    root, done = tmp_path_factory.mktemp("tokenizers"), {}

    def folder(kind: str) -> Path:
        if kind == "qwen3" and not QWEN_RANKS.exists():
            pytest.skip("Qwen's vocabulary is not beside the checkout")
        if kind not in done:
            done[kind] = write_tokenizer(kind, root / kind)
        return done[kind]

    return folder


@pytest.fixture(scope="module")
def both(folders: Callable[[str], Path]) -> Callable[[str], tuple[Tokenizer, Any]]:
    """A kind of tokenizer, and the same one in transformers."""
    done: dict[str, tuple[Tokenizer, Any]] = {}

    def pair(kind: str) -> tuple[Tokenizer, Any]:
        folder = folders(kind)
        if kind not in done:
            done[kind] = read_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
        return done[kind]

    return pair


def streamed(tokenizer: Tokenizer, ids: list[int], begins: bool = True) -> str:
    stream = TextStream(tokenizer, begins=begins)
    return "".join([*map(stream.push, ids), stream.flush()])


def compare(ours: Tokenizer, theirs: Any, count: int, seed: int) -> None:
    """Fails for a fuzzed text that the two encode, begin or decode differently, or that is streamed differently."""
    special = tuple(map(ours.spelling, sorted(ours.special)))
    texts = [text for text in fuzzed(count, seed, special) if text]
    for begin in range(0, len(texts), 1000):
        part = texts[begin : begin + 1000]
        expected = theirs(part, add_special_tokens=False, split_special_tokens=True).input_ids
        prompts = theirs(part, split_special_tokens=True).input_ids
        for text, ids, prompt in zip(part, expected, prompts, strict=True):
            assert ours.encode(text) == ids, text
            assert ours.encode_prompt(text) == prompt, text
            assert ours.decode(ids) == theirs.decode(ids), text
            assert ours.decode(prompt) == theirs.decode(prompt), text
            assert streamed(ours, prompt) == theirs.decode(prompt, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind_are_encoded_decoded_and_streamed_as_by_transformers(both: Callable, kind: str) -> None:
    compare(*both(kind), FUZZED, seed=1)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_are_encoded_decoded_and_streamed_as_by_transformers(both: Callable, kind: str) -> None:
    compare(*both(kind), min(MOST, MANY * times()), seed=2)


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", LEARNED)
def test_any_text_is_encoded_as_by_transformers(both: Callable, kind: str) -> None:
    ours, theirs = both(kind)

    @examples(30)
    @given(st.text())
    def check(text: str) -> None:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == ids
        assert streamed(ours, ids) == theirs.decode(ids, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_streamed_as_they_are_decoded(both: Callable, kind: str) -> None:
    ours, theirs = both(kind)
    chance = random.Random(3)
    for _ in range(1000):
        ids = chance.choices(range(ours.vocab_size), k=chance.randint(0, 12)) + chance.choices([*ours.special], k=1)
        plain = [number for number in ids if number not in ours.special]
        assert streamed(ours, ids) == ours.decode(plain)
        if kind not in BYTE_FALLBACK:
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(plain) == theirs.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_characters_do_not_replace_their_neighbours(both: Callable) -> None:
    ours, theirs = both("llama2")
    ids = [3 + b for b in "é".encode() + b"\xff" + "中".encode()]
    assert ours.decode(ids) == streamed(ours, ids) == "é\ufffd中"
    assert theirs.decode(ids) == "\ufffd" * 6  # the whole run, so it could not be streamed
    assert ours.decode(ids[:2]) == theirs.decode(ids[:2]) == "é"


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_tokens_characters_are_text_and_other_added_tokens_are_tokens(both: Callable, kind: str) -> None:
    ours, _ = both(kind)
    unknown = {"metaspace": {0}}.get(kind, set())  # no byte fallback: "<" is unknown to it
    for number in ours.special:
        name = ours.spelling(number)
        for text in (name, f" {name} ", name * 3, f"a{name}\n", f"{name}é", f"\u0301{name}"):
            assert not ours.special - unknown & set(ours.encode(text)), text
    if kind == "qwen3":
        for token in QWEN_PLAIN:
            (number,) = ours.encode(token)
            assert (ours.spelling(number), number in ours.special) == (token, False)
            assert streamed(ours, [number]) == token


def test_qwens_ids_are_those_of_its_published_ranks(both: Callable) -> None:
    ours, _ = both("qwen3")
    published = tiktoken.Encoding("qwen", pat_str=LINE_SPLITTERS[0], mergeable_ranks=qwen_ranks(), special_tokens={})
    assert ours.encode(TEXT) == published.encode_ordinary(TEXT)
    assert ours.encode("Hello, world! 12") == [9707, 11, 1879, 0, 220, 16, 17]
    assert (ours.eot, ours.stops, ours.bos) == (151645, (151645, 151643), ())
    assert ours.encode("e\u0301") == ours.encode("é")  # NFC


@pytest.mark.parametrize(
    ("kind", "eot", "stops", "bos"),
    [
        ("llama3", "<|eot_id|>", ("<|eot_id|>", "<|end_of_text|>"), ("<|begin_of_text|>",)),
        ("smollm2", "<|endoftext|>", ("<|endoftext|>",), ()),
        ("mistral", "</s>", ("</s>",), ("<s>",)),
        ("metaspace", "</s>", ("</s>",), ()),
    ],
)
def test_the_files_say_what_begins_and_ends_a_text(
    both: Callable, kind: str, eot: str, stops: tuple[str, ...], bos: tuple[str, ...]
) -> None:
    ours, theirs = both(kind)
    assert (ours.spelling(ours.eot), *map(ours.spelling, ours.stops), *map(ours.spelling, ours.bos)) == (
        eot,
        *stops,
        *bos,
    )
    assert theirs.eos_token_id == ours.eot
    assert ours.encode_prompt("") == [*(ours.bos or (ours.eot,))]


def test_ids_without_a_token_have_no_text(both: Callable) -> None:
    ours, theirs = both("llama3")
    assert ours.vocab_size == 1005 > len(theirs)
    assert (ours.spelling(280), ours.decode([280]), ours.decode_bytes([280, 1004])) == ("", "", b"<|eot_id|>")
    ids = [*ours.encode("Mädchen"), 280, *ours.encode(" sat")]
    assert streamed(ours, ids) == ours.decode(ids) == "Mädchen sat"


def test_a_prefix_space_is_dropped_only_where_a_text_begins(both: Callable) -> None:
    ours, _ = both("llama2")
    ids = ours.encode("cat sat")
    assert streamed(ours, ids) == "cat sat"
    assert streamed(ours, ids, begins=False) == " cat sat"
    assert streamed(ours, [*ours.bos, *ids]) == "cat sat"
    assert ours.decode([*ours.bos, *ids]) == "<s> cat sat"
    assert ours.decode(ours.encode("  two")) == "  two"
    assert (ours.decode_bytes(ids[:1]), ours.first_bytes(ids[0])) == (b" cat", b"cat")


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_become_replacement_characters(both: Callable, kind: str) -> None:
    ours, _ = both(kind)
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")
    assert ours.encode("a\ud83d\ude42") == ours.encode("a🙂")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["qwen3", "llama3", "llama2"])
@pytest.mark.parametrize("run", ["a", " ", "\n", " \n", "=", "7", "é", "🙂"])
def test_long_runs_take_linear_time(both: Callable, kind: str, run: str) -> None:
    ours, _ = both(kind)
    text = run * 50_000 + "x"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_only_where_their_ids_stay_the_same(both: Callable, kind: str) -> None:
    ours, _ = both(kind)
    assert ours.splits_lines == (kind != "metaspace")  # which makes one token of unknown characters, across lines
    if not ours.splits_lines:
        return
    special = tuple(map(ours.spelling, sorted(ours.special)))
    texts = [text for text in fuzzed(1500, 5, special) if re.fullmatch(r"\S(.*\S)?", text, re.DOTALL)]
    for left, right in pairwise(texts):
        cut = ours.encode(f"{left}\n") + ours.encode(right, begins=False)
        assert cut == ours.encode(f"{left}\n{right}"), (left, right)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("smollm2", {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}),
        ("smollm2", {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}}),
        ("smollm2", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\S+\n\S+|\s+"), BYTE_LEVEL]}}),
        ("llama3", {"normalizer": {"type": "Replace", "pattern": {"Regex": "\n"}, "content": ""}}),
        ("llama2", {"normalizer": {"type": "Replace", "pattern": {"String": "\n"}, "content": ""}}),
        ("llama2", {"model__vocab__\na": 700}),
        ("llama2", {"pre_tokenizer": split(r"\n\S")}),
    ],
)
def test_a_tokenizer_that_may_look_across_lines_is_known(copied: Callable, kind: str, changes: dict[str, Any]) -> None:
    folder = copied(kind)
    change(folder, **changes)
    assert not read_tokenizer(folder).splits_lines


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_or_pickled_tokenizer_is_the_same_to_the_byte(
    both: Callable, folders: Callable, kind: str, tmp_path: Path
) -> None:
    ours, _ = both(kind)
    save_tokenizer(ours, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folders(kind) / file.name).read_bytes()
    data = pickle.dumps(ours)
    encoding_of.cache_clear()
    again = pickle.loads(data)
    special = "".join(map(ours.spelling, sorted(ours.special)))
    assert (again.fingerprint, again.eot, again.stops) == (ours.fingerprint, ours.eot, ours.stops)
    assert again.encode(TEXT + special) == ours.encode(TEXT + special)


def change(folder: Path, name: str = "tokenizer.json", **changes: Any) -> None:
    """Sets values by path, as in model__type."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a kind of tokenizer, to change."""
    return lambda kind: Path(shutil.copytree(folders(kind), tmp_path / "copy"))


def test_the_fingerprint_follows_from_what_the_tokenizer_does(both: Callable, copied: Callable) -> None:
    ours, _ = both("llama3")
    folder = copied("llama3")
    change(
        folder,
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )  # and in one line
    change(folder, "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=9)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    change(folder, model__merges=[merge.split(" ") for merge in merges])
    assert read_tokenizer(folder).fingerprint == ours.fingerprint
    change(folder, "special_tokens_map.json", eos_token="<|end_of_text|>")
    other = read_tokenizer(folder)
    assert other.stops == (1001, 1004)
    change(folder, normalizer={"type": "NFC"})
    assert len({ours.fingerprint, other.fingerprint, read_tokenizer(folder).fingerprint}) == 3


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tokenizer.json", {"model__type": "Unigram"}, "model is 'Unigram'; expected 'BPE'"),
    ("tokenizer.json", {"model__type": "WordPiece"}, "model is 'WordPiece'; expected 'BPE'"),
    ("tokenizer.json", {"model__dropout": 0.1}, "dropout 0.1, so its ids are random"),
    ("tokenizer.json", {"model__merges": [["zz", "zz"]]}, "zz.* out of vocabulary"),
    ("tokenizer.json", {"model__vocab": {"a": 1, "b": 1}}, "'a' and 'b' have the id 1"),
    ("tokenizer.json", {"model__vocab": {"a": -1}}, "integer `-1`"),
    ("tokenizer.json", {"normalizer": {"type": "Shuffle"}}, "NormalizerUntagged"),
    ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAB"}}, "Precompiled"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "'Whitespace', which lose characters; .*ByteLevel"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Shuffle"}}, "'Shuffle', which lose characters"),
    ("tokenizer.json", {"decoder": {"type": "WordPiece", "prefix": "##"}}, "decoder is .*'WordPiece'.*; expected Byte"),
    ("tokenizer.json", {"decoder": None}, "decoder is None"),
    ("tokenizer.json", {"added_tokens": []}, "no end-of-text token is named; expected eos_token in tok"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}, "code of its own"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<new>"}}}, "'<new>', which tokenizer.json"),
    ("special_tokens_map.json", {"bos_token": "a"}, "text that reads 'a' would become this special token"),
    ("generation_config.json", {"eos_token_id": "</s>"}, r"generation_config\.json: eos_token_id is '</s>'; expected"),
    ("generation_config.json", {"eos_token_id": [4, 5000]}, "eos_token_id is 5000, which is no token; .* 0 to 1004"),
    ("added_tokens.json", {"<more>": 1005}, r"'<more>', which tokenizer\.json lacks"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_tokenizer_that_cannot_be_kept_exactly_is_refused_in_one_line(
    copied: Callable, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = copied("llama3")
    if "added_tokens" in changes:
        (folder / "special_tokens_map.json").unlink()
        change(folder, "tokenizer_config.json", eos_token=None)
        (folder / "generation_config.json").unlink()
    change(folder, name, **changes)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_added_token_whose_id_the_library_would_change_is_refused(copied: Callable) -> None:
    folder = copied("smollm2")
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder, added_tokens=[*tokens, {**tokens[0], "content": "<far>", "id": 600}])
    with pytest.raises(TokenizerError, match="'<far>' has the id 600, which the library `tokenizers` changes to 504"):
        read_tokenizer(folder)


def test_a_pattern_that_backtracks_too_far_is_an_error_of_ours(copied: Callable) -> None:
    folder = copied("smollm2")
    change(folder, pre_tokenizer=split("(x+x+)+y"))
    tokenizer = read_tokenizer(folder)
    with pytest.raises(TokenizerError, match="cannot split a text of 40 characters"):
        tokenizer.encode("x" * 40)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_a_folder_that_has_another_librarys_file_says_how_to_convert_it(
    folders: Callable, tmp_path: Path, name: str
) -> None:
    folder = publish(folders("llama2"), tmp_path / "model", 704)
    (folder / "tokenizer.json").rename(folder / name)
    with pytest.raises(PackageError, match=rf"holds no tokenizer: .*, only {re.escape(name)}\. To convert it"):
        open_package(folder)
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        read_tokenizer(folder)


def test_a_file_over_the_limit_is_refused(copied: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.tokenizer.TOKENIZER_BYTES", 1000)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is unreadable: it has .* expected at most 1,000"):
        read_tokenizer(copied("llama3"))


def test_a_published_qwen3_is_opened_continued_tuned_and_opened_by_transformers(
    folders: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish(folders("qwen3"), tmp_path / "hub", 151936)
    package = open_package(folder)
    assert package.tokenizer.vocab_size == 151652
    assert main([str(folder), "--prompt", "从前 <think>", "--max-new-tokens", "8", "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    params = SamplingParams(max_new_tokens=8, seed=1)
    assert (
        shown == "从前 <think>" + generate_text(package.load_model(), package.tokenizer, "从前 <think>", params) + "\n"
    )

    tuned = save_package(tmp_path / "tuned", package.config, package.load_model().state_dict(), package.tokenizer, {})
    assert tuned.tokenizer.fingerprint == package.tokenizer.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tuned.path / name).read_bytes() == (folder / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tuned.path / name).read_text())
        assert [said[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [151643, [151645, 151643], 151643]
    theirs = PreTrainedTokenizerFast.from_pretrained(tuned.path)  # Qwen2Tokenizer would rebuild it for seconds
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith(
        "<|im_start|>user"
    )
    ids = theirs(TEXT).input_ids
    assert ids == package.tokenizer.encode(TEXT)
    model = AutoModelForCausalLM.from_pretrained(tuned.path).eval()
    ids = ids[:20]
    with torch.inference_mode():
        theirs_logits = model(torch.tensor([ids])).logits
        torch.testing.assert_close(tuned.load_model()(torch.tensor([ids])), theirs_logits, atol=1e-4, rtol=0)


def test_a_generation_ends_at_every_stop_token(
    folders: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = open_package(publish(folders("llama3"), tmp_path / "model", 1024))
    tokenizer, model = package.tokenizer, package.load_model()
    (letter,) = tokenizer.encode("a")
    for stop in tokenizer.stops:
        drawn = iter([letter, 1002, letter, stop, letter])  # 1002 is special
        monkeypatch.setattr("gptcore.sampling.next_tokens", lambda *_, drawn=drawn: [next(drawn)])
        assert generate_text(model, tokenizer, "a", SamplingParams(9)) == "aa"
        request = Request("one", tuple(tokenizer.encode_prompt("a")), SamplingParams(9))
        continuation = Continuation(request, tokenizer, context_length=64)
        assert continuation.add(letter) == ("a", None)
        assert continuation.add(stop) == ("", FinishReason.STOP)
        kept = Continuation(replace(request, params=SamplingParams(9, ignore_eos=True)), tokenizer, context_length=64)
        assert kept.add(stop) == ("", None)


def test_the_engine_continues_a_text_after_its_bos(folders: Callable, tmp_path: Path) -> None:
    package = open_package(publish(folders("llama2"), tmp_path / "model", 704))
    engine = Engine(package, EngineSettings(backend="torch", device="cpu", dtype="float32"))
    prompt = engine.encode("The cat")
    assert prompt == (1, *package.tokenizer.encode("The cat"))
    engine.add(Request("one", prompt, SamplingParams(12, seed=5, logprobs=2), prompt_logprobs=True))
    updates = []
    while engine.busy:
        updates += engine.step()
    text = "".join(update.text for update in updates)
    assert text == generate_text(package.load_model(), package.tokenizer, "The cat", SamplingParams(12, seed=5))
    entries = [entry for update in updates for entry in update.logprobs]
    assert text == b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", errors="replace")
    engine.close()
