"""Wrong input to the job gives one line that says what to do, and exit code 2, before Ray or anything else starts."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError
from gptcore.model import GPT
from gptcore.package import save_package
from gptcore.tokenizer import Tokenizer
from tests.refusals import one_error
from train_job import run
from train_job.cli import parse_settings
from train_job.cluster.connect import resources_per_worker
from train_job.config import build_config

Refused = Callable[..., str]

TINY = ["--tokenizer=bytes", "--num-layers=1", "--num-heads=1", "--hidden-size=16", "--max-steps=2"]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the job, which must refuse its input. Returns its one line."""
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start_ray() -> None:
        raise AssertionError("Ray was started for input that is wrong")

    monkeypatch.setattr(run, "ray_cluster", start_ray)

    def call(*flags: str, tiny: bool = True) -> str:
        assert run.main([*(TINY if tiny else ()), *flags]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert not list((tmp_path / "home" / "runs").glob("*")), "something was begun"
        return one_error(said.err)

    return call


def test_an_unknown_flag_gets_the_nearest_one_as_a_hint(refused: Refused) -> None:
    assert "Did you mean '--batch-size'" in refused("--batchsize=3")


@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf"])
@pytest.mark.parametrize("name", ["target_loss", "target_bits_per_byte", "target_train_loss"])
def test_an_impossible_target_is_refused(refused: Refused, name: str, value: str) -> None:
    said = refused(f"--{name.replace('_', '-')}={value}")
    assert f"{name} is {float(value)}; expected more than 0, and finite" in said


def test_a_name_that_cannot_be_a_folder_name_is_refused(refused: Refused) -> None:
    assert "name has 300 bytes; expected at most 200" in refused(f"--name={'a' * 300}")
    assert "name is 'a/b'" in refused("--name=a/b")


@pytest.mark.parametrize("missing", ["hf:gpt2", "hf:openai-community/gpt2"])
def test_a_parent_that_cannot_be_fetched_says_what_is_needed(
    refused: Refused, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    said = refused(f"--init-from={missing}", "--max-steps=2", tiny=False)
    assert f"hf:openai-community/gpt2 is not in {tmp_path / 'empty'}" in said
    assert "hf download openai-community/gpt2" in said


def test_an_unknown_preset_gets_the_nearest_one_as_a_hint(refused: Refused) -> None:
    assert "Did you mean 'shakespeare'" in refused("--preset=shakespear")


def test_a_missing_corpus_is_named(refused: Refused, text_file: Path) -> None:
    answer = refused(f"--data={text_file.with_name('rhymes.txt')}")
    assert "rhymes.txt" in answer
    assert "Did you mean 'rhyme.txt'" in answer


@pytest.mark.parametrize("flag", ["--data", "--init-from", "--storage-path", "--cache-dir"])
def test_the_home_folder_of_an_unknown_user_is_named(refused: Refused, flag: str, text_file: Path) -> None:
    answer = refused(f"--data={text_file}", f"{flag}=~nobody-of-this-name/x", tiny=flag != "--init-from")
    assert "'~nobody-of-this-name/x' starts with an unknown home folder" in answer


def test_an_empty_corpus_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused(f"--data={tmp_path / 'empty.txt'}")


def test_a_binary_corpus_is_named_with_the_position(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "image.txt").write_bytes(b"text " * 30 + b"\x00\xff\xfe" + b"text " * 30)
    answer = refused(f"--data={tmp_path / 'image.txt'}")
    assert "image.txt" in answer
    assert "150" in answer


def test_a_context_longer_than_the_corpus_is_refused_with_one_that_fits(refused: Refused, text_file: Path) -> None:
    answer = refused(f"--data={text_file}", "--context-length=100000")
    assert "100000" in answer
    assert "at most" in answer


def test_a_corpus_too_small_for_its_vocabulary_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("only a few words, " * 20)
    answer = refused(f"--data={tmp_path / 'small.txt'}", "--preset=quick", "--max-steps=2", tiny=False)
    assert "2048" in answer


def test_a_tracking_server_that_is_down_at_the_start_is_named(
    refused: Refused, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound but not listening, so nothing answers
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert uri in refused(f"--data={text_file}")


def test_resuming_a_missing_run_names_it(refused: Refused) -> None:
    assert "no run 'yesterday'" in refused("--resume=yesterday")


@pytest.mark.parametrize("url", ["ftp://host/runs", "file://relative/runs", "file:///with a space"])
def test_an_unsupported_storage_url_lists_the_supported_ones(refused: Refused, url: str) -> None:
    answer = refused(f"--storage-path={url}")
    assert url in answer
    assert "file:///FOLDER, s3://BUCKET/FOLDER" in answer


def test_a_package_whose_vocabulary_does_not_match_its_tokenizer_is_refused(
    refused: Refused, text_file: Path, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    config = ModelConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=1, context_length=32)
    package = save_package(tmp_path / "package", config, GPT(config).state_dict(), byte_tokenizer, {})
    settings = (package.path / "config.json").read_text()
    (package.path / "config.json").write_text(settings.replace('"vocab_size": 320', '"vocab_size": 100'))
    (package.path / "foundry.json").unlink()  # a folder of someone else's, with no checksums
    answer = refused(f"--data={text_file}", f"--init-from={package.path}", "--max-steps=2", tiny=False)
    assert "vocabulary" in answer


def test_an_altered_package_is_refused(
    refused: Refused, text_file: Path, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    config = ModelConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=1, context_length=32)
    package = save_package(tmp_path / "package", config, GPT(config).state_dict(), byte_tokenizer, {})
    weights = package.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    answer = refused(f"--data={text_file}", f"--init-from={package.path}", "--max-steps=2", tiny=False)
    assert "model.safetensors" in answer


def test_a_used_run_name_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("preset: quick\n")
    assert run.main(["--name=mine"]) == 2
    assert "--resume mine" in capsys.readouterr().err
    assert run.main(["--resume=mien"]) == 2
    assert "Did you mean 'mine'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_device_is_refused(refused: Refused, text_file: Path) -> None:
    assert "'cuda'" in refused(f"--data={text_file}", "--device=cuda")


@pytest.mark.parametrize(
    ("flags", "cpus", "share"),
    [
        (["--num-workers=1"], [2], 2),
        (["--num-workers=2"], [2], 1),
        (["--num-workers=2"], [4, 2], 2),
        (["--num-workers=3"], [2, 2, 2], 2),
        (["--num-workers=1:4"], [8], 2),
        (["--num-workers=4"], [2], 1),
        (["--num-workers=2", "--cpus-per-worker=1"], [8], 1),
    ],
)
def test_workers_get_whole_cpus_that_fit_on_the_nodes(flags: list[str], cpus: list[int], share: int) -> None:
    config = build_config(parse_settings(flags))
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)}} for n in cpus]
    assert resources_per_worker(config, nodes) == {"CPU": share}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-workers=4"], "room for 2"),
        (["--cpus-per-worker=3"], "room for 0"),
        (["--use-gpu"], "Ray sees 0 GPUs"),
    ],
)
def test_a_request_for_more_than_the_machine_has_fails_at_once(flags: list[str], words: str) -> None:
    config = build_config(parse_settings(flags))
    with pytest.raises(ConfigError, match=words):
        resources_per_worker(config, [{"Alive": True, "Resources": {"CPU": 2.0}}], fixed=True)


def test_a_sample_prompt_that_fills_the_context_is_refused(refused: Refused, text_file: Path) -> None:
    answer = refused(f"--data={text_file}", "--context-length=16", "--sample-prompts", "far longer than sixteen bytes")
    assert "'far longer than sixteen bytes' has 29 tokens" in answer


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--resume=", "resume is empty; give it a value, or leave it out"),
        ("--name=", "name is empty"),
        ("--init-from=", "init_from is empty"),
        ("--val-data=", "val_data is empty"),
        ("--storage-path=", "storage_path is empty"),
        ("--document-separator=", "document_separator is empty"),
        ("--config=", "cannot read the config file"),
        ("--register-as=a/b", "register_as is 'a/b'; expected a name of at most 250 characters, without / and :"),
        ("--register-as= ", "register_as is ' '; expected a name"),
        ("--experiment=a\nb", r"experiment is 'a\nb'; expected a name"),
        ("--name=\udcff", r"name is '\udcff'; expected text in UTF-8"),
        ("--data=caf\udce9.txt", r"data is 'caf\udce9.txt'; expected text in UTF-8"),
        ("--data=http://[::1", "'http://[::1' is not a URL"),
        ("--data=/dev/null", "/dev/null is neither a file nor a folder"),
        ("--resume=" + "x" * 300, "resume has 300 bytes; expected at most"),
        ("--resume=../x", "resume is '../x'; expected a name"),
        ("--batch-size=99999999999999", "batch_size is 99999999999999, with 256 tokens each; expected at most"),
        ("--storage-path=/dev/null/x", "cannot be a run's folder: Not a directory"),
    ],
)
def test_a_value_that_could_only_fail_later_is_refused_at_once(refused: Refused, flag: str, message: str) -> None:
    assert message in refused(flag)


def test_a_resumed_run_keeps_its_name(refused: Refused) -> None:
    assert "the run that goes on is 'one'; it keeps its name" in refused("--resume=one", "--name=two", tiny=False)
