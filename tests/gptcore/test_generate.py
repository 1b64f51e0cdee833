"""The command line: a package and a prompt give text; every mistake gives one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.generate import main
from gptcore.package import Package
from gptcore.sampling import SamplingParams, generate_text
from tests.refusals import PROGRESS, one_error

Capture = pytest.CaptureFixture[str]


def test_the_command_prints_prompt_and_continuation(package: Package) -> None:
    command = [sys.executable, "-m", "gptcore.generate", str(package.path), "--prompt", "Café: ", "--seed", "4"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, "--max-new-tokens", "20"], capture_output=True, cwd=root, timeout=120)
    params = SamplingParams(max_new_tokens=20, seed=4)
    expected = "Café: " + generate_text(package.load_model(), package.tokenizer, "Café: ", params) + "\n"
    assert done.stdout.decode() == expected
    assert (done.returncode, PROGRESS.sub("", done.stderr.decode())) == (0, "")


def test_a_terminal_without_utf_8_shows_what_it_can(package: Package) -> None:
    command = [sys.executable, "-m", "gptcore.generate", str(package.path), "--prompt", "Café: ", "--seed", "4"]
    root, env = Path(__file__).resolve().parents[2], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "--max-new-tokens", "5"], capture_output=True, cwd=root, env=env, timeout=120)
    assert done.stdout.startswith(b"Caf?: ")
    assert (done.returncode, PROGRESS.sub("", done.stderr.decode())) == (0, "")


def test_every_flag_reaches_the_sampler(package: Package, capsys: Capture) -> None:
    flags = ["--max-new-tokens=9", "--temperature=0.6", "--top-k=30", "--top-p=0.9", "--seed=8"]
    assert main([str(package.path), "--prompt=ab", *flags]) == 0
    params = SamplingParams(max_new_tokens=9, temperature=0.6, top_k=30, top_p=0.9, seed=8)
    model = package.load_model()
    assert capsys.readouterr().out == "ab" + generate_text(model, package.tokenizer, "ab", params) + "\n"
    flags = ["--max-new-tokens=40", "--seed=8", "--min-p=0.01", "--repetition-penalty=1.2", "--presence-penalty=0.5"]
    assert main([str(package.path), "--prompt=ab", *flags, "--frequency-penalty=-0.5", "--stop=e", "--stop=\n"]) == 0
    params = SamplingParams(40, 1.0, 0, 1.0, 8, 0.01, 1.2, 0.5, -0.5, ("e", "\n"))
    assert capsys.readouterr().out == "ab" + generate_text(model, package.tokenizer, "ab", params) + "\n"
    assert main([str(package.path), "--prompt", "ab", "--max-new-tokens", "9", "--greedy"]) == 0
    greedy = SamplingParams(max_new_tokens=9, temperature=0)
    assert capsys.readouterr().out == "ab" + generate_text(model, package.tokenizer, "ab", greedy) + "\n"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_continue_the_text_too(package: Package, weights: str, capsys: Capture) -> None:
    command = [str(package.path), "--prompt=ab", "--max-new-tokens=9", "--seed=8", f"--weights={weights}"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("ab")
    assert len(text) > len("ab\n")
    assert main(command) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PACKAGE", "--weights", "int2"], "weights is 'int2'; expected one of int8, int4."),
        (["PACKAGE", "--temprature", "1"], "unrecognized arguments: --temprature 1. Did you mean '--temperature'?"),
        (["PACKAGE", "--temperature", "-1"], "temperature is -1.0"),
        (["PACKAGE", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["PACKAGE", "--greedy", "--temperature", "2"], "not allowed with argument --greedy"),
        (["PACKAGE", "--top-p", "0"], "top_p is 0.0"),
        (["PACKAGE", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["PACKAGE", "--prompt", "x" * 64], "at most 63 fit"),
        (["PACKAGE/../packagee"], "Did you mean"),
        (["PACKAGE/.."], "model.safetensors is missing"),
        (["PACKAGE/README.md"], "is a file"),
        ([], "required: PACKAGE_OR_URI"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, package: Package, capsys: Capture
) -> None:
    assert main([argument.replace("PACKAGE", str(package.path), 1) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in one_error(err)


def test_a_damaged_package_is_one_line_and_exit_code_2(package: Package, capsys: Capture) -> None:
    (package.path / "model.safetensors").write_bytes(b"no weights")
    assert main([str(package.path)]) == 2
    assert one_error(capsys.readouterr().err)
