"""Ways to break a package: its files cut, changed, missing or replaced, or whole and wrong with the right hashes."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptcore.package import CONFIG, MANIFEST, WEIGHTS

Break = Callable[[Path], None]
"""Breaks a copy of a good package."""


def broken() -> Iterator[tuple[str, Break]]:
    """(name, how) of each kind."""
    for file in (WEIGHTS, MANIFEST, CONFIG, "tokenizer.json"):
        for what, change in CONTENT.items():
            yield f"{file} {what}", lambda folder, file=file, change=change: rewrite(folder / file, change)
        if file != MANIFEST:  # a folder without one is an open model's
            yield f"{file} is missing", lambda folder, file=file: (folder / file).unlink()
        yield f"{file} is a folder", lambda folder, file=file: replace_by_folder(folder / file)
        yield f"{file} is a link to nothing", lambda folder, file=file: replace_by_link(folder / file, "/nowhere")
        yield f"{file} is endless", lambda folder, file=file: replace_by_link(folder / file, "/dev/zero")
    for what, values in CONFIGS.items():
        yield f"config.json {what}", lambda folder, values=values: resign(folder, CONFIG, set_values(values))
    for what, header in HEADERS.items():
        yield f"the weights' header {what}", lambda folder, header=header: resign(folder, WEIGHTS, set_header(header))


CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "is empty": lambda content: b"",
    "has its first byte alone": lambda content: content[:1],
    "is cut in half": lambda content: content[: len(content) // 2],
    "lacks its last byte": lambda content: content.rstrip()[:-1],
    "has another first byte": lambda content: flipped(content, 0),
    "has another last byte": lambda content: flipped(content, len(content.rstrip()) - 1),
    "has another byte in the middle": lambda content: flipped(content, len(content) // 2),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "wants a context of a thousand million tokens": {"max_position_embeddings": 10**9},
    "wants three million layers": {"num_hidden_layers": 3_000_000},
    "has another width": {"hidden_size": 48},
    "has a negative number of heads": {"num_attention_heads": -2},
    "is of an unknown kind": {"model_type": "unheard-of"},
    "has a word for a number": {"vocab_size": "many"},
    "has nothing for a number": {"rms_norm_eps": None},
}
HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "lacks a tensor": lambda header: header.pop(first(header)) and None,
    "names a tensor that no model has": lambda header: header.update({"strange": header.pop(first(header))}),
    "has another shape": lambda header: header[first(header)].update(shape=[1, 2, 3]),
    "has an unknown type": lambda header: header[first(header)].update(dtype="F7"),
    "points behind the end": lambda header: header[first(header)].update(data_offsets=[0, 2**40]),
}


def first(header: dict[str, Any]) -> str:
    """The first tensor's name."""
    return next(name for name in header if name != "__metadata__")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def set_values(values: dict[str, Any]) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


def set_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """Changes the header of a safetensors file, whose length comes first."""

    def changed(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        said = json.dumps(header).encode()
        return struct.pack("<Q", len(said)) + said + content[8 + length :]

    return changed


def resign(folder: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file and puts its hash in the manifest right, as whoever has made such a package would."""
    rewrite(folder / file, change)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def copy(good: Path, folder: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, folder, symlinks=False))
