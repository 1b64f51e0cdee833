"""GPT-2 as Hugging Face's hub has it, small and made here: its folders in every layout, the client's cache, a hub.

No weights of the real model are had without a network. Names, layouts and files are the published ones, and GPT-2's
own vocabulary where it lies beside the checkout.
"""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptcore.config import ModelConfig
from gptcore.hf_format import published_config, to_published
from gptcore.model import GPT
from gptcore.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
MADE_HERE = ("qkv_bias", "tie_word_embeddings", "n_inner")
"""Keys of config.json that OpenAI's lacks."""


@dataclass(frozen=True)
class Layout:
    """The layout of a GPT-2 on the hub. The defaults are those of openai-community/gpt2."""

    prefix: str = ""
    masks: tuple[str, ...] = ("bias",)
    """Whether each layer includes its causal masks."""
    head: str = "left out"
    """Whether a tied head is left out, stored beside the embedding, or instead of it."""
    files: int = 1
    dtype: torch.dtype = torch.float32
    tokenizer: tuple[str, ...] = ("tokenizer.json", "vocab.json", "merges.txt")


def publish_gpt2(
    folder: Path, layout: Layout = Layout(), seed: int = 0, tokenizer: Tokenizer | None = None, **shape: Any
) -> Path:
    """Writes a GPT-2 of random weights into `folder`; returns it."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    sizes: dict[str, Any] = dict(hidden_size=64, num_layers=2, num_heads=4, context_length=64) | shape
    config = ModelConfig(family="gpt2", vocab_size=tokenizer.vocab_size, dropout=0.1, **sizes)
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.1 + (value.ndim == 1 and "norm" in name)
        for name, value in model.state_dict().items()
    }
    state["lm_head.weight"] = state["embed_tokens.weight"]
    tensors = {layout.prefix + n.removeprefix("transformer."): t for n, t in to_published(model, state)}
    if layout.head != "left out":
        tensors["lm_head.weight"] = state["lm_head.weight"].clone()
    if layout.head == "instead":
        del tensors[f"{layout.prefix}wte.weight"]
    T = config.context_length
    for layer in range(config.num_layers):
        values = {"bias": torch.ones(T, T).tril().view(1, 1, T, T), "masked_bias": torch.tensor(-1e4)}
        tensors |= {f"{layout.prefix}h.{layer}.attn.{name}": values[name] for name in layout.masks}
    folder.mkdir(parents=True)
    _save_weights({name: t.to(layout.dtype).contiguous() for name, t in tensors.items()}, folder, layout.files)
    raw = {k: v for k, v in published_config(config).items() if k not in MADE_HERE}
    raw |= {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "summary_type": "cls_index"}
    (folder / "config.json").write_text(json.dumps(raw))
    _save_tokenizer(tokenizer, folder, layout.tokenizer)
    return folder


def _save_weights(tensors: dict[str, torch.Tensor], folder: Path, files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {tensor: names[i * files // len(tensors)] for i, tensor in enumerate(tensors)}
    for name in names:
        part = {tensor: tensors[tensor] for tensor, file in where.items() if file == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, files: tuple[str, ...]) -> None:
    """The files that are asked for, in GPT-2's own form: merges.txt opens with its version."""
    save_tokenizer(tokenizer, folder)
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"]), ""]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - {*files}:
        (folder / name).unlink()


def put_into_cache(cache: Path, repo: str, folder: Path, commit: str = COMMIT) -> Path:
    """Puts `folder` into Hugging Face's cache as their client does: blobs, and a snapshot of links to them."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for made in (snapshot, home / "blobs", home / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        (home / "blobs" / blob).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    (home / "refs" / "main").write_text(commit)
    return snapshot


@contextmanager
def hub(repo: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Starts a hub with `folder` as `repo`. Yields its address and the list of files fetched from it."""
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    fetched: list[str] = []
    info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                self._answer(200, json.dumps(info).encode())
            elif path == f"/api/models/{repo}/tree/{COMMIT}":
                self._answer(200, json.dumps(tree).encode())
            elif name in files:
                fetched.extend([name] if self.command == "GET" else [])
                self._answer(200, files[name])
            else:
                self._answer(404, b'{"error": "Repository not found"}')

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for key, value in {
                "Content-Length": len(body),
                "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Content-Type": "application/json",
            }.items():
                self.send_header(key, str(value))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", fetched
        server.shutdown()
