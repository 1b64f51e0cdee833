"""The settings of a run, and the errors for wrong ones."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcore.config import MODEL_PRESETS
from gptcore.errors import ConfigError
from gptcore.units import count
from train_job.cli import EXAMPLES, WIDEST, groups, parse_settings
from train_job.config import PRESETS, UNBOUNDED, build_config, resume_config
from train_job.planning import presets
from train_job.training.devices import assumed_rates, find_device
from train_job.yaml_files import read_yaml, write_yaml


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_config_and_names_a_model(preset: str) -> None:
    config = build_config({"preset": preset})
    assert config.model_config(vocab_size=64).num_layers == MODEL_PRESETS[preset]["num_layers"]
    assert config.planned_steps(steps_per_epoch=1)[0] < UNBOUNDED


def test_flags_win_over_the_config_file_which_wins_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: story\nbatch_size: 6\nlearning_rate: 1e-4\nnum_layers: 3\n")
    config = build_config(parse_settings(["--config", str(file), "--batch-size", "12", "--no-compile"]))
    assert (config.preset, config.batch_size, config.learning_rate) == ("story", 12, 1e-4)
    assert config.model["num_layers"] == 3
    assert config.stride == PRESETS["story"]["stride"]


def test_a_written_config_is_read_back_the_same(tmp_path: Path) -> None:
    config = build_config({"preset": "mini", "sample_prompts": ["a", "b"], "max_minutes": 2.5})
    write_yaml(config.flat(), tmp_path / "config.yaml")
    assert build_config(parse_settings(["--config", str(tmp_path / "config.yaml")])) == config


def test_a_users_limit_replaces_the_presets() -> None:
    config = build_config({"preset": "mini", "max_steps": 7})
    assert (config.max_steps, config.max_epochs) == (7, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-stpes", "5"], ["--max-stpes", "Did you mean '--max-steps'"]),
        (["--preset", "quik"], ["quik", "quick"]),
        (["--max-steps", "many"], ["max_steps", "many", "whole number", "steps"]),
        (["--max-steps", "0"], ["max_steps is 0", "more than 0"]),
        (["--learning-rate", "nan"], ["learning_rate is nan"]),
        (["--learning-rate", "-1"], ["learning_rate is -1"]),
        (["--optimizer", "moun"], ["moun", "Did you mean 'muon'"]),
        (["--num-workers", "4:1"], ["4:1", "MIN:MAX"]),
        (["--num-workers", "9"], ["num_workers 9", "batch_size 8"]),
        (["--num-heads", "7"], ["hidden_size 256", "num_heads 7"]),
        (["--family", "gpt3"], ["gpt3", "Did you mean 'gpt2'"]),
        (["--dropout", "1"], ["dropout is 1.0"]),
        (["--val-fraction", "0"], ["val_fraction is 0", "val_data"]),
        (["--init-from", "here", "--num-layers", "2"], ["init_from", "num_layers"]),
        (["--init-from", "here", "--tokenizer", "bytes"], ["init_from", "tokenizer"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
    ],
)
def test_bad_settings_are_named_with_what_was_expected(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(parse_settings(argv))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_siez: 3", ["batch_siez", "Did you mean 'batch_size'"]),
        ("compile: perhaps", ["compile", "perhaps", "true or false"]),
        ("batch_size: [3]", ["batch_size", "[3]"]),
        ("just words", ["holds no settings"]),
        ("a: b: c", ["cannot read"]),
    ],
)
def test_bad_yaml_is_named_with_what_was_expected(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        build_config(parse_settings(["--config", str(tmp_path / "run.yaml")]))
    assert all(word in str(caught.value) for word in words), caught.value


def test_help_lists_every_field_with_its_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for flag in ("--max-steps", "--num-workers", "--hidden-size", "--matrix-learning-rate", "--resume"):
        assert flag in text
    assert "[steps; default: 20]" in text
    assert "[tokens; default: 256]" in text


def test_help_begins_with_examples_and_presets_and_has_no_long_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDEST
    first_flags = text.index("--val-fraction")
    assert text.index("examples:") < text.index("presets:") < first_flags
    for name in PRESETS:
        assert f"\n  {name} " in text[:first_flags]
    for title, _ in groups():
        assert f"\n{title}:\n" in text
    examples = re.findall(r"^  python train_job/run.py ?(.*?)(?:  # .*)?$", text, re.MULTILINE)
    assert len(examples) == len(EXAMPLES)
    for arguments in examples:
        if "--presets" not in arguments:
            build_config(parse_settings(shlex.split(arguments)))


def test_the_notes_on_presets_name_each_with_its_size() -> None:
    assert presets.NOTES.keys() == PRESETS.keys()
    for name, note in presets.NOTES.items():
        assert note.startswith(f"{count(presets._work(name)[1].parameters)} parameters"), name


def test_the_table_of_presets_has_shape_memory_and_time_on_this_machine() -> None:
    device = find_device("h100")
    head, titles, *rows = presets.table(device, assumed_rates(device))
    assert head == "here      H100, 75 GiB"
    assert [row.split()[0] for row in rows] == list(PRESETS)
    assert [word for word in titles.split() if word in ("memory", "step", "run")] == ["memory", "step", "run"]
    foundry = next(row for row in rows if row.startswith("foundry-124m"))
    assert "qwen3   12      768    1024     123.6M" in foundry
    assert re.search(r"\d+\.\d GiB +\d+\.\d\d s +4,769 steps, \d+:\d\d", foundry)
    small = presets.table(replace(device, memory=1e9), assumed_rates(device))
    assert "too much" in next(row for row in small if row.startswith("mini"))


def test_a_resumed_run_may_change_its_end_but_not_its_steps() -> None:
    saved = build_config({"max_steps": 10, "name": "x"}).flat()
    assert resume_config(saved, {"resume": "x", "max_steps": "20"}).max_steps == 20
    assert resume_config(saved, {"resume": "x", "batch_size": "8"}).batch_size == 8  # as it was
    with pytest.raises(ConfigError, match="batch_size was 8 when run x began and cannot become '16'"):
        resume_config(saved, {"resume": "x", "batch_size": "16"})
    with pytest.raises(ConfigError, match="tokenizer was"):
        resume_config(saved, {"resume": "x", "tokenizer": "bytes"})
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        resume_config(saved, {"resume": "x", "max_step": "16"})


def test_a_fine_tuned_run_keeps_its_parents_shape_when_it_is_read_back() -> None:
    child = build_config({"init_from": "models:/gpt/3", "dropout": 0.1, "max_steps": 5, "name": "child"})
    saved = child.flat()
    assert "num_layers" not in saved
    assert "tokenizer" not in saved
    resumed = resume_config(saved, {"resume": "child", "max_steps": 9})
    assert (resumed.init_from, resumed.model["dropout"], resumed.max_steps) == ("models:/gpt/3", 0.1, 9)
    with pytest.raises(ConfigError, match='num_layers was "the parent\'s"'):
        resume_config(saved, {"resume": "child", "num_layers": "3"})


def test_samples_need_a_prompt() -> None:
    with pytest.raises(ConfigError, match="sample_prompts is empty"):
        build_config({"sample_prompts": []})


def test_a_resumed_run_with_a_new_limit_drops_the_recipes_limit() -> None:
    saved = build_config({"name": "x"}).flat()  # quick ends by epochs or steps
    resumed = resume_config(saved, {"resume": "x", "max_steps": "2000"})
    assert (resumed.max_steps, resumed.max_epochs) == (2000, None)


@pytest.mark.parametrize(
    "flag",
    [
        "--num-kv-heads=0",
        "--head-dim=-2",
        "--intermediate-size=-5",
        "--cpus-per-worker=0",
        "--max-epochs=inf",
        "--beta1=1",
        "--seed=1e20",
        "--learning-rate=inf",
        "--max-failures=-5",
        "--norm-eps=-1",
    ],
)
def test_numbers_that_would_fail_later_are_refused_at_once(flag: str) -> None:
    with pytest.raises(ConfigError, match=flag.removeprefix("--").partition("=")[0].replace("-", "_")):
        build_config(parse_settings([flag]))


def test_a_whole_number_keeps_all_its_digits() -> None:
    assert build_config({"seed": "9007199254740993"}).seed == 9007199254740993
    assert build_config({"seed": str(2**63 - 1)}).seed == 2**63 - 1
    assert build_config({"seed": "1e3"}).seed == 1000


def test_a_range_of_workers_in_yaml_is_not_read_as_a_base_60_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("num_workers: 1:4\nbatch_size: 64\nlearning_rate: 0.5\n")
    config = build_config(read_yaml(str(tmp_path / "c.yaml")))
    assert (config.num_workers, config.batch_size, config.learning_rate) == ("1:4", 64, 0.5)


@pytest.mark.parametrize("prompts", [5, None, {"a": 1}, ["a", None]])
def test_prompts_that_are_not_text_are_refused(prompts: Any) -> None:
    with pytest.raises(ConfigError, match=r"sample_prompts is .*; expected a list of texts"):
        build_config({"sample_prompts": prompts})


def test_settings_are_the_same_after_json_so_that_a_finished_run_is_known_again():
    config = build_config({"init_from": "hf:a/b", "lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]})
    assert json.loads(json.dumps(config.flat())) == config.flat()
