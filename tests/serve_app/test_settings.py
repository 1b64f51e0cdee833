"""serve_app.settings: which settings exist, where they are set, and how wrong ones are refused."""

import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gptcore.engine import EngineSettings
from gptcore.errors import ConfigError
from serve_app.settings import FIELDS, Canary, ServeSettings, load_settings, markdown, name_of

ROOT = Path(__file__).resolve().parents[2]


def load(environ: dict[str, str] | None = None, **given: Any) -> ServeSettings:
    return load_settings(given, environ or {})


def test_by_default_the_champion_is_served_on_loopback_without_keys():
    settings = load()
    assert settings.sources == {"gpt": "models:/gpt@champion"}
    assert (settings.host, settings.api_keys, settings.cors_origins) == ("127.0.0.1", (), ())
    assert settings.tracking_uri.startswith("sqlite:////")


def test_a_builders_argument_wins_over_the_environment():
    environ = {"GPT_MODEL": "models:/story@champion", "GPT_MAX_REPLICAS": "4", "GPT_COMPILE": "true", "GPT_SLOTS": ""}
    settings = load(environ, max_replicas="2", poll_seconds=1)
    assert settings.sources == {"story": "models:/story@champion"}
    assert (settings.max_replicas, settings.compile, settings.slots, settings.poll_seconds) == (2, True, 0, 1.0)


def test_every_setting_can_be_set_in_the_environment_with_its_type():
    said = {"models": "a=models:/a@champion,b=hf:x/y", "eager": "b", "canary": "b:0.5", "model": "b", "api_keys": "k,l"}
    said |= {"cors_origins": "*", "tracking_uri": "http://127.0.0.1:5000", "host": "0.0.0.0", "device": "cpu"}
    said |= {"dtype": "float32", "backend": "torch", "log_level": "debug", "compile": "true", "prefix_cache": "false"}
    said |= {"speculation": "false"}
    said |= {"feedback_bytes": "3000000"}
    vllm = {"engine": "vllm", "tensor_parallel": "2", "gpu_share": "0.3"}  # they exclude some of the others
    native = {"weights": "int8"}
    said |= dict.fromkeys(FIELDS.keys() - said.keys() - vllm.keys() - native.keys(), "3")
    defaults = ServeSettings()
    for together in (said, vllm, native):
        settings = load({f"GPT_{name.upper()}": text for name, text in together.items()})
        for name in together:
            assert type(getattr(settings, name)) is type(getattr(defaults, name)), name
            assert getattr(settings, name) != getattr(defaults, name), name
    assert said.keys() | vllm.keys() | native.keys() == FIELDS.keys()


def test_models_are_named_the_first_is_the_default_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = "custom=models:/gpt@champion, gpt2=hf:openai-community/gpt2, local=runs/a/package"
    settings = load(models=said)
    assert settings.default_model == "custom"
    assert settings.sources == {
        "custom": "models:/gpt@champion",
        "gpt2": "hf:openai-community/gpt2",
        "local": str(tmp_path / "runs/a/package"),
    }
    assert load(models=said, model="gpt2").default_model == "gpt2"
    assert load(models={"a": "models:/a@b"}).sources == {"a": "models:/a@b"}  # as a Serve config may write it
    assert load(models="there=s3://bucket/package").sources == {"there": "s3://bucket/package"}
    assert load(feedback="votes").feedback == str(tmp_path / "votes")
    assert load(feedback="s3://bucket/votes").feedback == "s3://bucket/votes"
    both = load(models="gpt2=hf:openai-community/gpt2", model="models:/gpt@champion")
    assert list(both.sources) == ["gpt", "gpt2"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models:/gpt@champion", "gpt"),
        ("models:/gpt@candidate", "gpt@candidate"),
        ("models:/gpt/7", "gpt"),
        ("hf:openai-community/gpt2", "gpt2"),
        ("runs:/0a1b/model", "0a1b"),
        ("/data/my model/", "my-model"),
    ],
)
def test_a_source_without_a_name_gets_one(source: str, name: str):
    assert name_of(source) == name
    assert load(model=source).default_model == name


def test_a_canary_is_a_source_or_a_name_and_a_share():
    assert load().canary_share is None
    assert load(canary="models:/gpt@candidate:0.1").canary_share == Canary("models:/gpt@candidate", 0.1)
    assert load(models="a=models:/a@x,b=/p", canary="b:1").canary_share == Canary("b", 1.0)


def test_a_canary_is_named_as_in_models_or_after_its_source():
    assert load().canary_name == ""
    assert load(canary="models:/gpt@candidate:0.1").canary_name == "gpt@candidate"
    assert load(models="a=/a,b=/p", canary="b:1").canary_name == "b"
    assert load(models="a=/a,b=/p", canary="/q/b:1").canary_name == "b-canary"


def test_a_source_with_an_invalid_name_is_served_under_another():
    settings = load(models="chinese=models:/模型@champion,gpt=models:/gpt@champion", model="gpt", canary="chinese:0.5")
    assert settings.sources == {"gpt": "models:/gpt@champion", "chinese": "models:/模型@champion"}
    assert settings.canary_name == "chinese"


def test_the_tracking_uri_is_the_given_one_or_mlflows_or_the_embedded_database(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    mlflow = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    assert load().tracking_uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert load(mlflow).tracking_uri == "http://127.0.0.1:5000"
    assert load(mlflow, tracking_uri="http://127.0.0.1:7000").tracking_uri == "http://127.0.0.1:7000"


@pytest.mark.parametrize(
    ("said", "param", "words"),
    [
        ({"max_replica": 2}, "max_replica", "Did you mean 'max_replicas'?"),
        ({"max_replicas": "many"}, "max_replicas", "'many'; expected a whole number of replicas"),
        ({"max_replicas": 1.5}, "max_replicas", "expected a whole number"),
        ({"max_replicas": True}, "max_replicas", "expected a whole number"),
        ({"max_replicas": 0}, "max_replicas", "0; expected at least 1"),
        ({"min_replicas": 2}, "min_replicas", "at most max_replicas, which is 1"),
        ({"min_replicas": -1}, "min_replicas", "-1; expected at least 0"),
        ({"poll_seconds": "nan"}, "poll_seconds", "expected"),
        ({"poll_seconds": 0}, "poll_seconds", "more than 0"),
        ({"request_timeout_s": "inf"}, "request_timeout_s", "finite"),
        ({"compile": "perhaps"}, "compile", "'perhaps'; expected true or false"),
        ({"dtype": "bf16"}, "dtype", "Did you mean 'bfloat16'?"),
        ({"weights": "q8_0"}, "weights", "expected one of int8, int4"),
        ({"weights": "int4", "backend": "torch"}, "weights", "leave out backend or weights"),
        ({"log_level": "loud"}, "log_level", "debug, info"),
        ({"port": 70000}, "port", "at most 65535"),
        ({"model": "~nobody-of-this-name/x"}, None, "'~nobody-of-this-name/x' starts with an unknown home folder"),
        ({"models": "gpt2"}, "models", "'gpt2'; expected NAME=SOURCE"),
        ({"models": "a=x,a=y"}, "models", "each name once"),
        ({"models": 3}, "models", "expected texts"),
        ({"models": "a b=x"}, "models", "expected NAME=SOURCE"),
        ({"models": "gpt2=hf:a/b", "model": "gpt3"}, "model", "Did you mean 'gpt2'?"),
        ({"models": "gpt=hf:a/b", "model": "models:/gpt@champion"}, "model", "expected another name"),
        ({"models": "gpt2=hf:a/b", "eager": "gpt"}, "eager", "Did you mean 'gpt2'?"),
        ({"canary": "models:/gpt@candidate"}, "canary", "SOURCE:SHARE"),
        ({"canary": "models:/gpt@candidate:1.5"}, "canary", "from 0 to 1"),
        ({"models": "模型=x"}, "models", "NAME: 1 to 64 of A-Z a-z 0-9 . _ @ -"),
        ({"model": "models:/模型@champion"}, "model", "1 to 64 of A-Z a-z 0-9 . _ @ -"),
        ({"model": "models:/模型@champion"}, "model", "or models=NAME=models:/模型@champion"),
        ({"canary": "models:/模型@champion:1"}, "canary", "models=NAME=models:/模型@champion and canary=NAME:1"),
        ({"models": "a=/x,a-canary=/y", "canary": "/z/a:0.5"}, "canary", "a name of its own"),
        ({"slots": [1]}, "slots", "expected a whole number"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(said: dict[str, Any], param: str, words: str):
    with pytest.raises(ConfigError) as caught:
        load(**said)
    assert caught.value.param == param
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_variable_is_logged_and_other_programs_variables_are_ignored(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("serve_app"), "propagate", True)
    load({"GPT_MAX_REPLICA": "4", "GPT_FOUNDRY_HOME": "/x", "GPT_ZZZ": "1"})
    assert {record.getMessage() for record in caplog.records} == {
        "the environment variable GPT_MAX_REPLICA is not a setting. Did you mean 'max_replicas'?"
    }


def test_keys_appear_neither_in_output_nor_in_errors():
    assert "hunter2" not in repr(load(api_keys="hunter2"))
    with pytest.raises(ConfigError) as caught:
        load(api_keys={"hunter2": 1})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="is empty"):
        load(api_keys=["hunter2", ""])


def test_the_service_has_all_settings_of_the_engine():
    assert {f.name for f in fields(EngineSettings)} <= FIELDS.keys()
    assert load(slots=3, threads=2, dtype="float32").engine_settings == EngineSettings(
        slots=3, threads=2, dtype="float32"
    )


def test_a_split_model_gets_a_gpu_for_each_part():
    assert load(engine="vllm", tensor_parallel=4).gpus == 4
    assert load(engine="vllm", tensor_parallel=4, num_gpus=4).gpus == 4
    assert load(engine="vllm", tensor_parallel=2, device="cpu").gpus == 0
    assert load(engine="vllm").gpus == load().gpus == 0
    assert load(num_gpus=0.5).gpus == 0.5


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"engine": "vlm"}, "engine is 'vlm'; expected one of foundry, vllm. Did you mean 'vllm'?"),
        ({"engine": "vllm", "backend": "native"}, "backend is 'native'; expected auto, since engine is 'vllm'"),
        ({"tensor_parallel": 2}, "tensor_parallel is 2; expected 1, since engine is 'foundry'"),
        ({"engine": "vllm", "tensor_parallel": 0}, "tensor_parallel is 0; expected at least 1"),
        ({"engine": "vllm", "gpu_share": 1.5}, "gpu_share is 1.5; expected more than 0 and at most 1"),
        ({"engine": "vllm", "tensor_parallel": 2, "num_gpus": 1}, "num_gpus is 1.0; expected at least tensor_parallel"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(said, message):
    with pytest.raises(ConfigError) as caught:
        load(**said)
    assert message in str(caught.value)


def test_the_module_prints_the_table_of_the_docs():
    printed = subprocess.run(
        [sys.executable, "-m", "serve_app.settings"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == markdown()
    rows = printed.strip().splitlines()
    assert len(rows) == len(FIELDS) + 2
    assert "| `max_queue` | `GPT_MAX_QUEUE` | `64` | Requests that may wait" in printed


def test_importing_the_package_and_its_settings_imports_neither_ray_nor_mlflow():
    code = "import sys, serve_app, serve_app.settings; sys.exit(bool({'ray', 'mlflow', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
