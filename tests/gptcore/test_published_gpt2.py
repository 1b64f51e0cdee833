"""GPT-2 opens in every layout on the hub, computes the same as transformers, and needs no network."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer

from gptcore.errors import HubError, PackageError
from gptcore.hub import resolve
from gptcore.package import open_package
from gptcore.tokenizer import Tokenizer, load_tokenizer
from tests.hugging_face import COMMIT, Layout, hub, publish_gpt2, put_into_cache

ROOT = Path(__file__).resolve().parents[2]
GPT2 = "openai-community/gpt2"
TEXT = "It's 1066, and the  café isn't open;\n\n\tHELLO wörld 东西 🙂 <|endoftext|> "

LAYOUTS = {
    "openai-community/gpt2": Layout(),
    "older masks": Layout(masks=("bias", "masked_bias")),
    "prefixed": Layout(prefix="transformer.", masks=()),
    "prefixed, with its head": Layout(prefix="transformer.", masks=(), head="beside"),
    "head, but no embedding": Layout(prefix="transformer.", masks=(), head="instead"),
    "in three files": Layout(prefix="transformer.", files=3),
    "in two files, bare": Layout(files=2),
    "F16": Layout(dtype=torch.float16),
    "BF16 in two files": Layout(prefix="transformer.", dtype=torch.bfloat16, files=2),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's client, which is in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_are_those_of_transformers(layout: Layout, tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2", layout)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    package = open_package(folder)
    x = torch.randint(0, package.config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(package.load_model()(x), theirs(x).logits, atol=1e-4, rtol=0)
    assert (package.info, package.config.tie_embeddings) == ({}, True)


@pytest.mark.parametrize(
    "files",
    [("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.json", "vocab.json", "merges.txt")],
    ids=["tokenizer.json", "vocab.json and merges.txt", "both"],
)
def test_the_tokenizer_is_read_from_any_supported_files(
    files: tuple[str, ...], learn: Callable[[int, str], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = learn(259, "#v #v cat, #v cat; " * 30)
    folder = publish_gpt2(tmp_path / "gpt2", Layout(tokenizer=files), tokenizer=tokenizer)
    assert {*files} == {file.name for file in folder.iterdir()} & {"tokenizer.json", "vocab.json", "merges.txt"}
    assert open_package(folder).tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("written_by", ["OpenAI", "transformers"])
def test_gpt2s_vocabulary_is_tiktokens(gpt2_cache: Path, tmp_path: Path, written_by: str) -> None:
    ours = load_tokenizer("gpt2")
    folder = publish_gpt2(tmp_path / "gpt2", tokenizer=ours, hidden_size=8, num_heads=2, context_length=1024)
    (folder / "tokenizer.json").unlink()
    fetched = gpt2_cache.glob("?" * 40)  # by tiktoken, which names files by a hash of their address
    vocabulary, merges = sorted(fetched, key=lambda file: -file.stat().st_size)
    shutil.copyfile(vocabulary, folder / "vocab.json")
    shutil.copyfile(merges, folder / "merges.txt")
    if written_by == "transformers":
        GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
        shutil.copyfile(tmp_path / "theirs" / "tokenizer.json", folder / "tokenizer.json")
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    package = open_package(folder)
    assert (package.tokenizer.name, package.tokenizer.vocab_size) == ("gpt2", 50257)
    assert package.tokenizer.fingerprint == ours.fingerprint
    plain = TEXT.replace("<|endoftext|>", "")
    assert AutoTokenizer.from_pretrained(folder).encode(plain) == package.tokenizer.encode(plain)


def test_a_pickle_is_refused_and_the_suggested_conversion_works(tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2")
    expected = open_package(folder).load_model().state_dict()
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PackageError, match=r"pytorch_model\.bin is a pickle.* is not opened") as caught:
        open_package(folder)
    assert "from_pretrained(FOLDER).save_pretrained(FOLDER)" in str(caught.value)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    actual = open_package(folder).load_model().state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_missing_part_of_the_weights_is_named(tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2", Layout(files=3))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PackageError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_package(folder)


@pytest.mark.parametrize("where", ['{"h.0": "../secret.safetensors"}', '{"h.0": "w.bin"}', "{}", '["x.safetensors"]'])
def test_an_index_may_only_point_to_weights_beside_it(where: str, tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2", Layout(files=2))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {where}}}')
    with pytest.raises(PackageError, match=r"index\.json is invalid"):
        open_package(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_broken_link_is_distinguished_from_a_missing_file(name: str, tmp_path: Path) -> None:
    layout = Layout(tokenizer=("tokenizer.json",))
    snapshot = put_into_cache(tmp_path / "hub", GPT2, publish_gpt2(tmp_path / "gpt2", layout))
    (snapshot / name).resolve().unlink()
    with pytest.raises(PackageError, match=rf"{name} is a link to a missing file: download it again"):
        open_package(snapshot)


# --- the cache and the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_as", [GPT2, "gpt2"])
@pytest.mark.parametrize("asked_for", [GPT2, "gpt2"])
def test_the_old_and_the_new_name_both_find_the_model_in_the_cache(
    cache: Path, tmp_path: Path, kept_as: str, asked_for: str
) -> None:
    snapshot = put_into_cache(cache, kept_as, publish_gpt2(tmp_path / "gpt2"))
    assert resolve(f"hf:{asked_for}") == snapshot
    assert open_package(resolve(f"hf:{asked_for}")).config.family == "gpt2"


def test_a_repositorys_folder_in_the_cache_can_be_named_by_its_path(cache: Path, tmp_path: Path) -> None:
    snapshot = put_into_cache(tmp_path / "copied", GPT2, publish_gpt2(tmp_path / "gpt2"))
    assert resolve(str(tmp_path / "copied" / "models--openai-community--gpt2")) == snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_where_hugging_faces_variables_say(
    cache: Path, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    inside = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    snapshot = put_into_cache(tmp_path / "elsewhere" / inside, GPT2, publish_gpt2(tmp_path / "gpt2"))
    assert resolve("hf:gpt2") == snapshot


def test_an_incomplete_snapshot_is_replaced_by_a_complete_one_or_named(cache: Path, tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2")
    newest = put_into_cache(cache, GPT2, folder, "f" * 40)
    (newest / "model.safetensors").unlink()
    with pytest.raises(HubError, match=rf"is incomplete in .*: {newest} lacks model\.safetensors"):
        resolve("hf:gpt2")
    older = put_into_cache(cache, GPT2, folder, "0" * 40)
    (cache / "models--openai-community--gpt2" / "refs" / "main").write_text("f" * 40)
    assert resolve("hf:gpt2") == older


@pytest.mark.parametrize("name", [GPT2, "gpt2-xl", "distilgpt2"])
def test_without_network_and_cache_one_line_says_what_to_fetch_and_where_to_put_it(cache: Path, name: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve(f"hf:{name}")
    said, repo = str(caught.value), {"gpt2-xl": f"{GPT2}-xl", "distilgpt2": "distilbert/distilgpt2"}.get(name, name)
    assert said.startswith(
        f"hf:{repo} is not in {cache}; HF_HUB_OFFLINE is set, so it was not downloaded. On a machine"
    )
    assert f"`hf download {repo} --include '*.json' --include '*.safetensors' --include 'merges.txt'`" in said
    assert f"copy models--{repo.replace('/', '--')} from its cache into this one" in said
    assert "the path of a folder with config.json, model.safetensors and tokenizer.json" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai-comunity/gpt2", "Did you mean 'openai-community/gpt2'"),
        ("a/b/c", "expected hf:ORG/NAME"),
        ("", "is not a name"),
    ],
)
def test_an_impossible_hub_name_is_refused_at_once(cache: Path, name: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        resolve(f"hf:{name}")


def generated(endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The result of the command line with a hub at this address."""
    command = [sys.executable, "-m", "gptcore.generate", "hf:gpt2", "--prompt=Once", "--max-new-tokens=8", "--greedy"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_a_model_is_fetched_from_the_hub_once(tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/config.json"):
        (folder / name).write_bytes(b"not wanted")
    with hub(GPT2, folder) as (address, fetched):
        first = generated(address, tmp_path / "hf")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Once")
    assert {"model.safetensors", "config.json", "vocab.json", "merges.txt", "chat_template.jinja"} <= {*fetched}
    assert not {"pytorch_model.bin", "tf_model.h5", "onnx/config.json"} & {*fetched}
    again = generated(address, tmp_path / "hf")  # the hub is gone now
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert (tmp_path / "hf/hub/models--openai-community--gpt2/snapshots" / COMMIT / "model.safetensors").is_symlink()


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Tells the hub's client, in this process, that the hub is at an address."""

    def at(address: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)

    return at


def test_a_repository_of_pickles_is_refused_before_any_download(online: Callable[[str], None], tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with hub("some/old-model", folder) as (address, fetched):
        online(address)
        with pytest.raises(
            HubError, match=r"hf:some/old-model has no model\.safetensors; its pytorch_model\.bin is a pi"
        ):
            resolve("hf:some/old-model")
    assert fetched == []


def test_a_hub_that_never_answers_times_out(
    online: Callable[[str], None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.hub.SERVER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            HubError, match=r"hf:openai-community/gpt2 is not in .* cannot be reached \(timed out\)"
        ) as caught:
            resolve("hf:gpt2")
        snapshot = put_into_cache(cache, GPT2, publish_gpt2(tmp_path / "gpt2"))
        assert resolve("hf:gpt2") == snapshot
    assert "\n" not in str(caught.value)


def test_a_name_unknown_to_the_hub_is_not_reported_as_a_network_error(
    online: Callable[[str], None], tmp_path: Path
) -> None:
    with hub(GPT2, publish_gpt2(tmp_path / "gpt2")) as (address, _):
        online(address)
        with pytest.raises(HubError, match=r"the hub has no model.* Did you mean 'openai-community/gpt2'") as caught:
            resolve("hf:openai-community/gpt3")
    assert "On a machine with network access" not in str(caught.value)


def test_the_settings_of_openais_gpt2_are_read_with_their_defaults(tmp_path: Path) -> None:
    folder = publish_gpt2(tmp_path / "gpt2")
    raw = json.loads((folder / "config.json").read_text())
    assert not {"tie_word_embeddings", "n_inner", "qkv_bias"} & {*raw}
    config = open_package(folder).config
    assert (config.tie_embeddings, config.qkv_bias, config.intermediate_size) == (True, True, 256)
