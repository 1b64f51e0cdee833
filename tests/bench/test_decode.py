"""The decoding benchmark gives all contestants the same work, in turn. These tests do not judge speeds."""

import json
from pathlib import Path

import pytest
import torch

from bench.decode import ENGINE, common_prefix, main, open_engine
from bench.floor import matrices, open_floor, step_bytes
from bench.peers.ctranslate2 import open_ctranslate2
from bench.peers.llama_cpp import open_llama_cpp
from bench.peers.task import DecodeTask, DecodeTurn
from bench.peers.transformers import open_transformers
from bench.peers.vllm import PYTHON, open_vllm
from bench.turns import Contestant, RunTurn, Unsupported, median_ratio, run_in_turn
from bench.weights import made_up_tokenizer, random_package
from gptcore.model import GPT, KVCache
from gptcore.package import Package

VOCAB = 400
LIBRARIES = {
    "transformers": (open_transformers, "transformers"),
    "CTranslate2": (open_ctranslate2, "ctranslate2"),
    "llama.cpp": (open_llama_cpp, "llama_cpp"),
}


@pytest.fixture(scope="module", params=["tiny", "quick"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A gpt2 and a qwen3 with a small vocabulary."""
    return random_package(tmp_path_factory.mktemp("bench") / "package", request.param, VOCAB)


@pytest.fixture
def task(package: Package, tmp_path: Path) -> DecodeTask:
    return DecodeTask(str(package.path), str(tmp_path), 3, prompt_tokens=9, new_tokens=6, threads=1, vocab_size=VOCAB)


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The plain model's greedy continuation."""
    cache, tokens, new = KVCache(model.config, 1), [], prompt
    for _ in range(count):
        with torch.inference_mode():
            new = [int(model(torch.tensor([new]), cache=cache)[0, -1].argmax())]
        tokens += new
    return tokens


def test_transformers_reads_the_made_up_vocabulary(package: Package) -> None:
    transformers = pytest.importorskip("transformers")
    text = "A naïve café, 12 of them…\n\tand it's déjà vu"
    ids = package.tokenizer.encode(text)
    assert package.tokenizer.decode(ids) == text
    assert transformers.AutoTokenizer.from_pretrained(package.path)(text)["input_ids"] == ids


def test_nearly_every_token_of_the_full_vocabulary_is_whole_characters() -> None:
    tokenizer = made_up_tokenizer()
    assert tokenizer.vocab_size == 50257
    assert sum("\ufffd" in tokenizer.decode([i]) for i in range(tokenizer.eot)) == 128


def test_random_weights_are_the_same_each_time_and_fit_bf16(package: Package, tmp_path: Path) -> None:
    preset = "tiny" if package.config.family == "gpt2" else "quick"
    again = random_package(tmp_path / "again", preset, VOCAB)
    weights, others = package.load_model().state_dict(), again.load_model().state_dict()
    for name, tensor in weights.items():
        assert tensor.equal(others[name])
        if name not in ("cos", "sin"):
            assert tensor.equal(tensor.bfloat16().float())


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_peer_continues_every_prompt_like_the_plain_model(name: str, package: Package, task: DecodeTask) -> None:
    opens, library = LIBRARIES[name]
    pytest.importorskip(library)
    if name == "llama.cpp":
        pytest.importorskip("gguf")
    run_turn, note = opens(task, "float32")
    turn = run_turn()
    model = package.load_model()
    assert turn.tokens == [greedy(model, prompt, task.new_tokens) for prompt in task.prompts()]
    assert turn.tokens == run_turn().tokens  # a turn leaves no state behind
    assert turn.decoded == task.batch * (task.new_tokens - 1)
    assert turn.prompt_seconds > 0
    assert turn.decode_seconds > 0
    assert name.lower() in note.lower()


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed; make .venv-vllm/installed does that")
def test_vllm_continues_every_prompt_like_the_plain_model(tmp_path: Path) -> None:
    package = random_package(tmp_path / "package", "quick", VOCAB)
    task = DecodeTask(str(package.path), "", 3, prompt_tokens=9, new_tokens=6, threads=1, vocab_size=VOCAB)
    run_turn, note = open_vllm(task, "float32")
    turn, model = run_turn(), package.load_model()
    assert turn.tokens == [greedy(model, prompt, task.new_tokens) for prompt in task.prompts()]
    assert turn.tokens == run_turn().tokens
    assert turn.decoded == task.batch * (task.new_tokens - 1)
    assert note.startswith("vLLM ")


def test_the_engine_does_the_same_work(package: Package, task: DecodeTask) -> None:
    run_turn, _ = open_engine(task, "float32", "auto", speculation=False)
    turn = run_turn()
    model = package.load_model()
    assert turn.tokens == [greedy(model, prompt, task.new_tokens) for prompt in task.prompts()]
    assert turn.decoded == task.batch * (task.new_tokens - 1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_engine_does_it_with_quantised_weights(package: Package, task: DecodeTask, weights: str) -> None:
    run_turn, note = open_engine(task, weights, "native", speculation=False)
    assert "native" in note
    assert [len(tokens) for tokens in run_turn().tokens] == [6] * 3


def test_the_floor_runs_every_matrix_of_the_model_once(package: Package, task: DecodeTask) -> None:
    model = package.load_model()
    sizes = [p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("embed")]
    if package.config.tie_embeddings:
        sizes.append(model.lm_head.weight.numel())
    assert sum(o * i for o, i in matrices(package.config)) == sum(sizes)
    run_turn, _ = open_floor(task, "float32")
    floor = run_turn()
    assert floor.step_seconds > 0
    assert floor.bandwidth > 0


def test_a_step_reads_each_weight_once_and_each_sequence_its_own_cache(package: Package) -> None:
    one, two = (step_bytes(package.config, batch, 100, "bfloat16") for batch in (1, 2))
    c = package.config
    assert two - one == 2 * 2 * c.num_layers * c.kv_heads * c.head_size * 100
    assert one - (two - one) == 2 * sum(o * i for o, i in matrices(c))


def test_rates_count_the_tokens_of_their_time() -> None:
    turn = DecodeTurn(prompt_seconds=1.0, decode_seconds=2.0, tokens=[[1] * 5, [1] * 5], decoded=8)
    assert turn.decode_rate == 4
    assert turn.whole_rate == pytest.approx(10 / 3)


def test_the_common_beginning_is_counted() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2


# --- turns -------------------------------------------------------------------------------------------------------


def open_recorder(task: DecodeTask, name: str) -> tuple[RunTurn, str]:
    """A contestant that appends its name to a file on each turn."""

    def run_turn() -> str:
        with (Path(task.scratch) / "order.txt").open("a") as file:
            file.write(name)
        return name

    return run_turn, f"{name}'s note"


def open_unsupported(task: DecodeTask, name: str) -> tuple[RunTurn, str]:
    raise Unsupported(f"{name} needs another machine")


def open_failing(task: DecodeTask, name: str) -> tuple[RunTurn, str]:
    def run_turn() -> str:
        raise ZeroDivisionError(f"{name} broke")

    return run_turn, ""


def test_contestants_run_in_turn_and_the_first_round_is_a_warm_up(task: DecodeTask) -> None:
    contestants = [Contestant(name, name, open_recorder) for name in "ab"]
    results = run_in_turn(contestants, task, turns=2)
    assert (Path(task.scratch) / "order.txt").read_text() == "ababab"
    assert results.turns == {"a a": ["a", "a"], "b b": ["b", "b"]}
    assert results.notes["a a"] == "a's note"


def test_a_contestant_that_cannot_run_here_is_reported_with_the_reason(task: DecodeTask) -> None:
    absent = Contestant("absent", "float32", open_recorder, needs=("no_such_library",))
    results = run_in_turn([absent, Contestant("unsupported", "float32", open_unsupported)], task, turns=1)
    assert results.turns == {}
    assert results.absent == {
        "absent float32": "not installed: no_such_library",
        "unsupported float32": "float32 needs another machine",
    }


def test_a_contestant_that_fails_ends_the_benchmark(task: DecodeTask) -> None:
    with pytest.raises(SystemExit, match="float32 broke"):
        run_in_turn([Contestant("failing", "float32", open_failing)], task, turns=1)


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    assert median_ratio([1, 20, 300], [1, 10, 100]) == 2


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.release
def test_the_command_reports_engine_floor_and_named_peers_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--preset tiny --batch 1 2 --dtype float32 --prompt-tokens 5 --new-tokens 4 --turns 1 --threads 1"
    assert main([*command.split(), "--peers", "transformers", "--prompt-floor"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["machine"]["threads"] == 1
    assert list(report["batches"]) == ["1", "2"]
    assert report["agreement"]["transformers float32"] == [24, 24]
    for batch in report["batches"].values():
        assert "transformers float32" in batch["contestants"]
        assert "llama.cpp bfloat16" not in batch["contestants"] | batch["absent"]
        row = batch["contestants"][f"{ENGINE} float32"]
        assert row["engine_ratio"] == 1
        assert row["decode_tokens_per_second"] > 0
        assert row["share_of_floor"] > 0
        assert 0 < row["share_of_python"] < 1
        assert row["share_of_prompt_floor"] > 0
        assert row["prompt_tokens_per_second"] > 0
        assert batch["contestants"]["transformers float32"]["engine_prompt_ratio"] > 0
        assert batch["floor"]["read_gigabytes_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--preset tinny", "Did you mean 'tiny'"),
        ("--batch 0", "--batch"),
        ("--vocab-size 299", "--vocab-size is 299; expected at least 300"),
        ("--turns 0", "--turns"),
        ("--peers vllm", "'vLLM'"),
    ],
)
def test_wrong_input_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert named in capsys.readouterr().err
