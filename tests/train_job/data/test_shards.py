"""Text to token shards: the content of the stream, the reuse of shards, and errors."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore import files
from gptcore.errors import CorpusError, TrainingError
from gptcore.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from tests.open_tokenizers import QWEN_RANKS, write_tokenizer
from train_job.data import pieces, shards
from train_job.data.batches import validation_batches
from train_job.data.corpus import open_corpus, split
from train_job.data.inputs import prepare_inputs
from train_job.data.shards import Shard, ShardChanged, TokenSet, prepare, token_dtype, token_ids


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes", None)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of twelve different files, enough for several shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(10):
        (folder / f"{n}.txt").write_text(f"Tale {n}. Größe ≠ Gewicht 🙂\n" * (n * 7 + 1))
    lines = [json.dumps({"text": f"line {n} <|endoftext|>"}) for n in range(50)]
    (folder / "more.jsonl").write_text("\n".join(lines))
    (folder / "z.txt").write_text("the end")
    return folder


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
    yield
    ray.shutdown()


def contents(tokens: TokenSet) -> list[bytes]:
    return [Path(shard.path).read_bytes() for shard in tokens.shards]


def stream(tokens: TokenSet) -> list[int]:
    return tokens.read(0, tokens.num_tokens).tolist()


def test_every_document_ends_with_end_of_text_and_the_first_also_begins_with_it(many, tmp_path, bytes_tokenizer):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    tokens = prepare(corpus, bytes_tokenizer, tmp_path)
    expected = [bytes_tokenizer.eot]
    for text in corpus.documents():
        expected += [*bytes_tokenizer.encode(text), bytes_tokenizer.eot]
    assert len(tokens.shards) > 3
    assert stream(tokens) == expected
    assert tokens.num_documents == 61
    assert tokens.num_bytes == sum(len(text.encode()) for text in corpus.documents())


@pytest.mark.parametrize("kind", ["llama3", "llama2", "smollm2"])
def test_an_open_models_documents_begin_with_its_bos_and_end_with_its_end_of_text(many, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_CHARS", 100)
    tokenizer = read_tokenizer(write_tokenizer(kind, tmp_path / kind))
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    tokens = prepare(corpus, tokenizer, tmp_path)
    expected = [*(tokenizer.bos or [tokenizer.eot])]
    for text in corpus.documents():
        expected += [*tokenizer.encode(text), tokenizer.eot, *tokenizer.bos]
    assert stream(tokens) == expected


def test_ray_data_makes_the_same_shards_as_one_process(many, tmp_path, bytes_tokenizer, local_ray):
    from train_job.cluster.ray_data import ray_map

    corpus = open_corpus(str(many), cache_dir=tmp_path)
    serial = prepare(corpus, bytes_tokenizer, tmp_path / "serial")
    parallel = prepare(corpus, bytes_tokenizer, tmp_path / "parallel", ray_map)
    assert contents(parallel) == contents(serial)
    assert (parallel.fingerprint, parallel.starts) == (serial.fingerprint, serial.starts)


def test_ray_map_keeps_the_order(local_ray):
    from train_job.cluster.ray_data import ray_map

    assert ray_map(lambda n: n * n, range(20)) == [n * n for n in range(20)]
    assert ray_map(str, []) == []


def test_a_bad_line_found_by_a_ray_task_is_named_here(many, tmp_path, bytes_tokenizer, local_ray):
    from train_job.cluster.ray_data import ray_map

    (many / "more.jsonl").write_text('{"text": "good"}\n{"text": "cut sho')
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"more\.jsonl, line 2: not JSON"):
        prepare(corpus, bytes_tokenizer, tmp_path, ray_map)


LONG = "x" * 70_000 + " " * 200_000 + "the end"


@pytest.mark.parametrize("text", ["a <|endoftext|> and it's naïve…\r\n  b", "half \ud800 of one", LONG])
@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_the_ids_that_are_written_are_those_that_the_tokenizer_gives(spec, text):
    tokenizer = load_tokenizer(spec, lambda: iter(pieces.builtin_documents()))
    for begins in (True, False):
        assert token_ids(tokenizer, text, begins, "<u2").tolist() == tokenizer.encode(text, begins)


def test_the_ids_of_a_published_tokenizer_are_its_own(tmp_path):
    tokenizer = read_tokenizer(write_tokenizer("qwen3" if QWEN_RANKS.exists() else "smollm2", tmp_path))
    text = "Grüße, 北京! 🙂 <|endoftext|>\n\n  x"
    ids = token_ids(tokenizer, text, True, "<u4").tolist()
    assert ids == tokenizer.encode(text)
    assert not QWEN_RANKS.exists() or max(ids) > 65535


def test_second_run_reuses_the_shards(many, tmp_path, bytes_tokenizer, monkeypatch):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    first = prepare(corpus, bytes_tokenizer, tmp_path)
    monkeypatch.setattr(shards, "write_shard", lambda *_, **__: pytest.fail("tokenised again"))
    assert prepare(open_corpus(str(many), cache_dir=tmp_path), bytes_tokenizer, tmp_path) == first


def test_the_same_text_elsewhere_is_the_same_shard(tmp_path, bytes_tokenizer):
    made = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one text")
        made.append(prepare(open_corpus(str(tmp_path / name), cache_dir=tmp_path), bytes_tokenizer, tmp_path))
    assert made[0] == made[1]


def test_another_tokenizer_or_a_changed_file_makes_new_shards(many, tmp_path, bytes_tokenizer):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    learned = load_tokenizer("bpe:300", corpus.documents)
    fingerprints = {prepare(corpus, tokenizer, tmp_path).fingerprint for tokenizer in (bytes_tokenizer, learned)}
    (many / "z.txt").write_text("the End")
    changed = open_corpus(str(many), cache_dir=tmp_path)
    fingerprints.add(prepare(changed, bytes_tokenizer, tmp_path).fingerprint)
    assert len(fingerprints) == 3


def test_a_truncated_shard_is_made_again(many, tmp_path, bytes_tokenizer):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    before = contents(tokens := prepare(corpus, bytes_tokenizer, tmp_path))
    whole = Path(tokens.shards[1].path)
    whole.write_bytes(whole.read_bytes()[:-2])
    Path(tokens.shards[2].path).with_suffix(".json").write_text('{"num_')
    assert contents(prepare(corpus, bytes_tokenizer, tmp_path)) == before


def test_shards_that_a_mapper_wrote_on_another_machine_are_made_here(many, tmp_path, bytes_tokenizer):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    tokens = prepare(corpus, bytes_tokenizer, tmp_path, mapper=lambda fn, items: [])
    assert contents(tokens) == contents(prepare(corpus, bytes_tokenizer, tmp_path / "again"))


@pytest.mark.parametrize("spec", ["bytes", "bpe:280"])
def test_every_validation_byte_is_counted_exactly_once(many, tmp_path, spec):
    train, validation = split(open_corpus(str(many), cache_dir=tmp_path), 0.3)
    tokenizer = load_tokenizer(spec, train.documents)
    tokens = prepare(validation, tokenizer, tmp_path)
    targets = [t for _, y in validation_batches(tokens, 64, 4) for t in y.flatten().tolist() if t >= 0]
    text = "".join(validation.documents())
    assert tokenizer.decode_bytes([t for t in targets if t != tokenizer.eot]) == text.encode()
    assert tokens.num_bytes == len(text.encode())
    assert targets.count(tokenizer.eot) == tokens.num_documents


def test_a_file_read_in_pieces_has_the_same_tokens_as_the_whole_file(tmp_path, monkeypatch):
    text = "".join(f"Line {n}, so 'tis:\n" + "\n" * (n % 3) + "  indented\n" * (n % 2) for n in range(500))
    (tmp_path / "big.txt").write_text(text)
    tokenizer = load_tokenizer("bpe:320", lambda: iter([text]))
    whole = stream(prepare(open_corpus(str(tmp_path / "big.txt"), cache_dir=tmp_path), tokenizer, tmp_path / "a"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 700)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    monkeypatch.setattr(shards, "BLOCK_CHARS", 100)
    corpus = open_corpus(str(tmp_path / "big.txt"), cache_dir=tmp_path)
    tokens = prepare(corpus, tokenizer, tmp_path / "b")
    assert len(corpus.pieces) > len(tokens.shards) > 5
    assert stream(tokens) == whole == [tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]
    assert tokens.num_documents == 1


def test_tiny_shakespeare_has_as_many_gpt2_tokens_as_nanogpt_counts(shakespeare, gpt2_cache, tmp_path):
    tokenizer = load_tokenizer("gpt2", None)
    halves = split(open_corpus(str(shakespeare), cache_dir=tmp_path), 0.1)
    counts = [prepare(half, tokenizer, tmp_path).num_tokens - 2 for half in halves]  # less the end-of-text at each end
    assert counts == [301_966, 36_059]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_are_stored_in_the_narrowest_type(bytes_tokenizer, monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(Tokenizer, "vocab_size", vocab_size)
    assert token_dtype(bytes_tokenizer) == dtype


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), data=st.data())
def test_reads_across_shards_equal_the_joined_stream(shard_folder, lengths, data):
    parts = [np.random.default_rng([*lengths, n]).integers(0, 60_000, size) for n, size in enumerate(lengths)]
    made = []
    for part in parts:
        path = shard_folder / f"{part.tobytes().hex()[:200]}.bin"
        part.astype("<u2").tofile(path)
        made.append(Shard(str(path), len(part), 0, 0))
    tokens = TokenSet(tuple(made), tuple(int(n) for n in np.cumsum([0, *lengths[:-1]])), "<u2", "")
    joined = np.concatenate(parts)
    start = data.draw(st.integers(0, len(joined)))
    length = data.draw(st.integers(0, len(joined) - start))
    assert tokens.read(start, length).tolist() == joined[start : start + length].tolist()
    assert tokens.read(start, length).dtype == np.int64
    with pytest.raises(IndexError):
        tokens.read(start, len(joined) - start + 1)


def test_a_token_set_is_small_when_pickled(tmp_path, bytes_tokenizer):
    (tmp_path / "a.txt").write_text("word " * 20_000)
    tokens = prepare(open_corpus(str(tmp_path / "a.txt"), cache_dir=tmp_path), bytes_tokenizer, tmp_path)
    tokens.read(0, 100)
    parcel = pickle.dumps(tokens)
    assert len(parcel) < 2000
    assert stream(pickle.loads(parcel)) == stream(tokens)


def test_a_changed_shard_is_made_again_and_one_that_was_only_touched_is_kept(many, tmp_path, bytes_tokenizer):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    before = prepare(corpus, bytes_tokenizer, tmp_path)
    right, (changed, touched) = contents(before), (Path(shard.path) for shard in before.shards[:2])
    before.check_unchanged()
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ShardChanged, match="was changed while it was in use"):
        before.check_unchanged()
    os.utime(touched, (1, 1))
    inode = touched.stat().st_ino
    after = prepare(corpus, bytes_tokenizer, tmp_path)
    assert contents(after) == right
    assert touched.stat().st_ino == inode
    after.check_unchanged()


def test_a_deleted_shard_can_be_read_where_it_is_mapped(many, tmp_path, bytes_tokenizer):
    tokens = prepare(open_corpus(str(many), cache_dir=tmp_path), bytes_tokenizer, tmp_path)
    before = stream(tokens)
    Path(tokens.shards[0].path).unlink()
    tokens.check_unchanged()
    assert stream(tokens) == before


def test_a_missing_shard_is_named(tmp_path):
    lost = TokenSet((Shard(str(tmp_path / "lost.bin"), 10, 10, 1),), (0,), "<u2", "")
    with pytest.raises(CorpusError, match=r"lost\.bin is not on this machine"):
        lost.read(0, 5)


def test_a_full_disk_names_the_folder_and_leaves_nothing_half_written(many, tmp_path, bytes_tokenizer, monkeypatch):
    corpus = open_corpus(str(many), cache_dir=tmp_path)
    room = 5_000

    class SmallDisk(io.FileIO):
        def write(self, data):
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(files, "open", SmallDisk, raising=False)
    with pytest.raises(TrainingError, match=rf"disk that holds {tmp_path}/cache/shards is full"):
        prepare(corpus, bytes_tokenizer, tmp_path / "cache")
    left = sorted((tmp_path / "cache" / "shards").iterdir())
    assert left  # files that were complete by then stay
    assert {path.with_suffix(".json") in left for path in left if path.suffix == ".bin"} == {True}
    assert {path.suffix for path in left} == {".bin", ".json"}


WRITER = """
import sys
from pathlib import Path
from train_job.files import written_whole
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half a shard")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_next_run_removes_what_a_killed_writer_left_in_the_cache(tmp_path, text_file, small):
    folder = tmp_path / "cache" / "shards"
    command = [sys.executable, "-c", WRITER, str(folder / "a.bin")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "writing\n"
        [draft] = folder.iterdir()
        os.utime(draft, (0, 0))  # written to long ago, as far as anyone can tell
        prepare_inputs(small())
        assert draft.exists(), "its writer lives"
    finally:
        writer.kill()
        writer.communicate()
    prepare_inputs(small())
    assert not draft.exists()
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path, bytes_tokenizer):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "file").write_text("in the way")
    corpus = open_corpus(str(tmp_path / "a.txt"), cache_dir=tmp_path)
    with pytest.raises(TrainingError, match=r"cannot write to .*/file/shards"):
        prepare(corpus, bytes_tokenizer, tmp_path / "file")


def test_a_corpus_of_empty_documents_is_refused(tmp_path, bytes_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n\n')
    with pytest.raises(CorpusError, match="every document in it is empty"):
        prepare(open_corpus(str(tmp_path / "a.jsonl"), cache_dir=tmp_path), bytes_tokenizer, tmp_path)


# --- documents within a text ----------------------------------------------------------------------------------------

END = "<|endoftext|>"


def documents_of(tokens: TokenSet, tokenizer: Tokenizer) -> list[str]:
    """The tokens between the end-of-text tokens of the stream."""
    ids, texts = stream(tokens)[1:], [[]]
    for token in ids:
        if token == tokenizer.eot:
            texts.append([])
        else:
            texts[-1].append(token)
    return [tokenizer.decode(text) for text in texts[:-1]]


@pytest.mark.parametrize("separator", [END, "\n", "\n\n", "ü\n---\n", "x"])
@pytest.mark.parametrize("size", [5, 23, 64, 10_000])
def test_a_separator_ends_a_document_wherever_the_text_is_split(
    tmp_path, bytes_tokenizer, monkeypatch, separator, size
):
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * size)
    texts = [f"Tale {n}. Größe\tund\rGewicht " * (n % 4 + 1) for n in range(30)]
    (tmp_path / "a.txt").write_bytes(separator.join(["", *texts, "", "", texts[0]]).encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": separator.join(texts[:2])}) + "\n")
    for name, expected in (("a.txt", [*texts, texts[0]]), ("b.jsonl", texts[:2])):
        corpus = open_corpus(str(tmp_path / name), cache_dir=tmp_path, separator=separator)
        tokens = prepare(corpus, bytes_tokenizer, tmp_path)
        assert documents_of(tokens, bytes_tokenizer) == expected
        assert tokens.num_documents == len(expected)
    corpus = open_corpus(str(tmp_path / "a.txt"), cache_dir=tmp_path, separator=separator)
    for fraction in (0.1, 0.313, 0.5, 0.77):
        halves = [prepare(half, bytes_tokenizer, tmp_path) for half in split(corpus, fraction)]
        joined = "".join(text for half in halves for text in documents_of(half, bytes_tokenizer))
        assert joined == "".join([*texts, texts[0]])


def test_the_characters_of_end_of_text_are_text_unless_they_are_the_separator(tmp_path, small):
    (tmp_path / "a.txt").write_text(f"one tale of some length{END}" * 40)
    (tmp_path / "none.txt").write_text("one tale of some length, " * 40)
    plain = prepare_inputs(small(data=str(tmp_path / "a.txt")))
    parted = prepare_inputs(small(data=str(tmp_path / "a.txt"), document_separator=END))
    assert plain.train.num_documents == 1
    assert parted.train.num_documents == 36
    assert parted.train.fingerprint != plain.train.fingerprint
    assert parted.train_corpus.fingerprint != plain.train_corpus.fingerprint
    assert (plain.notes, parted.notes) == ((), ())
    of_none = prepare_inputs(small(data=str(tmp_path / "none.txt"), document_separator=END))
    assert of_none.notes == (f"document_separator '{END}' has no effect: it does not occur in {tmp_path}/none.txt",)


def test_an_unused_text_column_is_reported(tmp_path, small):
    (tmp_path / "a.txt").write_text("one tale of some length, " * 40)
    (tmp_path / "a.csv").write_text("story\n" + "one tale of some length\n" * 40)
    notes = prepare_inputs(small(data=str(tmp_path / "a.txt"), text_column="story")).notes
    assert notes == (f"text_column 'story' has no effect: {tmp_path}/a.txt has no columns",)
    assert prepare_inputs(small(data=str(tmp_path / "a.csv"), text_column="story")).notes == ()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_bad_line_is_named_with_every_tokenizer(tmp_path, small, tokenizer):
    lines = [json.dumps({"txt" if n == 6 else "text": f"line {n} of this file"}) for n in range(1, 40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 6: no field 'text'; there are txt"):
        prepare_inputs(small(data=str(tmp_path / "a.jsonl"), tokenizer=tokenizer))


def test_a_text_too_small_to_train_on_is_refused_with_the_flags_that_would_work(tmp_path, small):
    (tmp_path / "a.txt").write_text("thirty characters, no more: 30")
    wanted = dict(data=str(tmp_path / "a.txt"), context_length=128)
    with pytest.raises(CorpusError, match=r"too small to train on: 27 bytes .* bpe:2048 needs about 56,889") as caught:
        prepare_inputs(small(**wanted, tokenizer="bpe:2048"))
    assert "--context-length 28 --tokenizer bytes" in str(caught.value)
    prepare_inputs(small(**wanted | {"context_length": 28}, tokenizer="bytes"))
