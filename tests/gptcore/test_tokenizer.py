"""Every tokenizer keeps every byte, survives saving, and encodes as transformers' AutoTokenizer does."""

import json
import pickle
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gptcore.errors import TokenizerError
from gptcore.merges import LONG_SPACE, cut_long_space
from gptcore.tokenizer import (
    EOT,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    read_tokenizer,
    save_tokenizer,
)
from tests.chance import examples

Learn = Callable[[int, str], Tokenizer]

TEXT = """ROMEO:  O, she doth teach the torches to burn bright!\r\n\tIt's 1597; they'll say we've 3.14 naïve façades…
مرحبا — Здравствуй — 你好，世界 — नमस्ते — 🜁🧑🏽‍🚀 e\u0301\u200d\ufeff <|endoftext|> \x00\x1f \u3000\u00a0x  \n\n y
"""

# Two regex engines with different Unicode versions split the text, so it only has old characters.
characters = st.characters(exclude_categories=("Cs", "Cn", "Co"))
any_text = st.text(characters) | st.text(st.sampled_from(" \n\t\r\u00a0\u2028'stmdlre019aZé中!?<|>endoftext"))


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return load_tokenizer("bpe:400", lambda: iter([TEXT * 3]))


@pytest.fixture(params=["bytes", "learned", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "learned":
        return request.getfixturevalue("learned")
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_cache")
    return load_tokenizer(request.param)


@pytest.mark.hypothesis
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    @examples(150)
    @given(any_text)
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_any_bytes_have_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encoding.encode_single_token(bytes([b])) for b in range(256)]
    assert sorted(ids) == list(range(256))
    assert tokenizer.decode_bytes(ids) == bytes(range(256))
    assert tokenizer.decode([ids[0xE4], ids[0x41]]) == "\ufffdA"


def test_the_end_of_text_is_the_last_id_and_its_characters_are_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.eot]) == EOT
    assert tokenizer.eot not in tokenizer.encode(EOT)


@pytest.mark.hypothesis
def test_transformers_encodes_identically(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    assert len(theirs) == tokenizer.vocab_size

    @examples(150)
    @given(any_text)
    def check(text: str) -> None:
        assert theirs.encode(text) == tokenizer.encode(text)

    check()
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT)
    assert theirs.decode(theirs.encode(TEXT)) == TEXT


def test_transformers_encodes_shakespeare_identically(
    shakespeare: Path, gpt2_cache: Path, learn: Learn, tmp_path: Path
) -> None:
    text = shakespeare.read_text()
    for tokenizer in (load_tokenizer("gpt2"), learn(2048, text)):
        save_tokenizer(tokenizer, tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.encode(text) == tokenizer.encode(text)


def test_all_kinds_of_white_space_are_split_identically(learned: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(learned, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    odd = [chr(c) for c in range(0x3100) if unicodedata.category(chr(c)) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
    for c in odd:
        text = f"a{c}b{c}{c}c {c} the{c}\n{c}"
        assert theirs.encode(text) == learned.encode(text), hex(ord(c))


def test_a_saved_tokenizer_is_read_back_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.name, again.eot, again.fingerprint) == (tokenizer.name, tokenizer.eot, tokenizer.fingerprint)


def test_a_pickled_tokenizer_needs_no_cache(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = pickle.dumps(tokenizer)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    again = pickle.loads(data)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.fingerprint == tokenizer.fingerprint


def test_gpt2_is_the_published_encoding(gpt2_cache: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.vocab_size == parse_tokenizer("gpt2") == 50257
    assert tokenizer.encode(TEXT) == tiktoken.get_encoding("gpt2").encode_ordinary(TEXT)


def test_a_folder_with_vocab_and_merges_is_read(gpt2_cache: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    save_tokenizer(tokenizer, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
    assert read_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_learning_is_deterministic_and_gives_the_size_asked_for(learn: Learn) -> None:
    first, second, other = learn(300, TEXT * 3), learn(300, TEXT * 3), learn(300, TEXT * 2 + "the the the" * 9)
    assert first.vocab_size == parse_tokenizer(first.name) == 300
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert learn(257, TEXT).encode("é") == list("é".encode())


def test_text_too_small_to_learn_from_says_which_size_is_possible(learn: Learn) -> None:
    with pytest.raises(TokenizerError, match=r"to learn 1000 tokens .* bpe:(\d+) is the largest") as caught:
        learn(1000, "to be or not to be")
    size = int(str(caught.value).split("bpe:")[1].split()[0])
    assert learn(size, "to be or not to be").vocab_size == size


@pytest.mark.parametrize("size", ["256", "0", "1048577", "99999999999", "9" * 5000])
def test_an_invalid_vocabulary_size_is_refused_before_anything_is_learned(size: str) -> None:
    with pytest.raises(TokenizerError, match=r"too (small|large); bpe:(257|1048576) .*the (small|larg)est"):
        load_tokenizer(f"bpe:{size}", lambda: pytest.fail("the text was read"))


ENDLESS = {
    "one letter": "a" * 2_000_000,
    "bases": "".join(random.Random(1).choices("ACGT", k=200_000)),
    "digits": "".join(random.Random(2).choices("0123456789", k=200_000)),
    "marks": "=" * 1_000_000,
    "ideographs": "".join(random.Random(3).choices("天地玄黄宇宙洪荒日月盈昃", k=100_000)),
    "emoji": "".join(random.Random(4).choices("🙂🙃😀😁🧑🏽", k=100_000)),
    "space": " " * 1_000_000 + "a",
    "lines": "\n" * 1_000_000,
}


@pytest.mark.timeout(60)  # each took minutes, or did not end
@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_without_word_breaks_is_learned_and_encoded_in_linear_time(name: str, tmp_path: Path) -> None:
    text = ENDLESS[name]
    tokenizer = load_tokenizer("bpe:264", lambda: iter([text]))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    save_tokenizer(tokenizer, tmp_path)
    part = text[-50_000:]  # longer than one batch of learning
    assert AutoTokenizer.from_pretrained(tmp_path).encode(part) == tokenizer.encode(part)


def test_an_error_while_reading_the_text_is_raised() -> None:
    def texts() -> Iterator[str]:
        yield "the cat sat on the mat. " * 10
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        load_tokenizer("bpe:260", texts)


def test_very_long_white_space_encodes_as_if_uncut(learned: Tokenizer) -> None:
    space = LONG_SPACE + 7
    text = "x" + " " * space + "the" + "\n" * space + "b" + "\t " * space + "\u3000é" + " " * space
    assert learned.encode(text) == learned.encoding.encode_ordinary(text)
    assert learned.decode(learned.encode(" " * 3_000_000 + "a")) == " " * 3_000_000 + "a"


@pytest.mark.parametrize("before", [1, 500, 999, 1000, 1001])
def test_the_shortest_long_white_space_is_cut_wherever_it_begins(before: int) -> None:
    text = "x" * before + " " * LONG_SPACE + "a"
    assert cut_long_space(text) == [text[:-2], " a"]


@pytest.mark.timeout(60)
def test_long_runs_of_white_space_below_the_cut_are_not_slow(learned: Tokenizer) -> None:
    text = (" " * (LONG_SPACE - 1) + "a") * 30  # looked at from each of its characters, minutes
    assert learned.decode(learned.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(learned: Tokenizer) -> None:
    assert learned.decode(learned.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-2", "Did you mean 'gpt2'"),
        ("byte", "Did you mean 'bytes'"),
        ("bpe2048", "Did you mean 'bpe:2048'"),
        ("bpe:256", "bpe:257 .* is the smallest"),
        ("", "not one of gpt2, bytes, bpe:N"),
    ],
)
def test_an_unknown_spec_names_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(spec)


def test_a_learned_tokenizer_needs_text() -> None:
    with pytest.raises(TokenizerError, match="learned from a corpus"):
        load_tokenizer("bpe:300")


@pytest.mark.parametrize("failure", [ConnectionError("no network"), None], ids=["refused", "hangs"])
def test_gpt2_offline_says_how_to_set_the_cache(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    released = Event()

    def unreachable(name: str) -> tiktoken.Encoding:
        if failure:
            raise failure
        released.wait()
        raise AssertionError

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    monkeypatch.setattr("gptcore.tokenizer.DOWNLOAD_SECONDS", 0.05)
    with pytest.raises(TokenizerError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")
    released.set()


def change_pattern(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


def change_model(content: dict) -> None:
    content["model"]["type"] = "Unigram"


def change_special(content: dict) -> None:
    content["added_tokens"][0]["content"] = "</s>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_pattern, "splits text by other rules"),
        (change_model, "'Unigram'"),
        (change_special, "'</s>' and '<|endoftext|>' have the id 399"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    change: Callable[[dict], None], message: str, learned: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(learned, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)


def change_normalizer(content: dict) -> None:
    content["normalizer"] = {"type": "NFC"}


def change_merges(content: dict) -> None:
    content["model"]["merges"].reverse()


def change_vocab(content: dict) -> None:
    content["model"]["vocab"]["!"] = 9999


@pytest.mark.parametrize("change", [change_normalizer, change_merges, change_vocab])
def test_a_tokenizer_that_is_nearly_ours_is_read_as_an_open_models(
    change: Callable[[dict], None], learned: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(learned, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert (tokenizer.name, tokenizer.spelling(tokenizer.eot)) == ("byte-level BPE", EOT)
    assert tokenizer.fingerprint != learned.fingerprint
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT)


def test_an_empty_or_broken_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is unreadable"):
        read_tokenizer(tmp_path)
