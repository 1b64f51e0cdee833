"""Versions that change, are broken, go, or are too large, and a registry that does not answer."""

import json
import math
import random
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from gptcore.hf_format import parse_config, tensor_shapes
from gptcore.package import CONFIG, MANIFEST, WEIGHTS
from tests.chaos import packages
from tests.chaos.fault import Result
from tests.chaos.gate import garbage, slow, status
from tests.chaos.serving.scene import CLIENTS, Scene, tally
from tests.waiting import eventually

REFUSED_SECONDS = 30.0
OUTAGE_SECONDS = 8.0


def alias_moved(scene: Scene, rng: random.Random) -> Result:
    """Ten moves in four seconds."""
    scene.await_whole()
    several_versions(scene)
    result, begun = Result(), time.monotonic()
    for moment in sorted(rng.uniform(0, 4) for _ in range(10)):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        last = rng.choice(scene.versions)
        scene.point(last)
        result.times += 1
    moved = time.monotonic()
    scene.await_only(last)
    result.recovery.append(time.monotonic() - moved)
    return tally(scene, begun, result)


def several_versions(scene: Scene) -> None:
    while len(scene.versions) < 4:
        scene.publish()


def broken_versions(scene: Scene, rng: random.Random) -> Result:
    """The alias on each kind of broken package, in random order."""
    scene.await_whole()
    result, begun = Result(), time.monotonic()
    kinds = list(packages.broken())
    rng.shuffle(kinds)
    for kind, harm in kinds:
        folder = copied(scene)
        harm(folder)
        expect_refusal(scene, result, folder, f"a package whose {kind}")
    scene.point(scene.versions[-1])
    return tally(scene, begun, result)


def copied(scene: Scene) -> Path:
    """A copy of a good package, to break."""
    scene.made += 1
    source = scene.registry.make_package(len(scene.versions)).path
    return packages.copy(source, scene.scratch / f"broken-{scene.made}")


def expect_refusal(scene: Scene, result: Result, folder: Path, what: str) -> str:
    """Moves the alias to the package, and waits until the service refuses it by name. Returns why it does so."""
    version = scene.register(folder)
    moved, reason = time.monotonic(), ""
    scene.point(version)
    try:
        reason = eventually(lambda: scene.refused().get(version), f"{what} is refused", REFUSED_SECONDS)
    except AssertionError:
        result.expect(False, f"{what} is not refused by name")
    result.recovery.append(time.monotonic() - moved)
    result.times += 1
    return reason


def deleted_version(scene: Scene, rng: random.Random) -> Result:
    """The alias on a version that is deleted before, or while, it is loaded."""
    scene.await_whole()
    result, begun = Result(), time.monotonic()
    for _ in range(3):
        good, doomed = scene.versions[-1], scene.publish()
        scene.point(doomed)
        time.sleep(rng.uniform(0, 1.5))
        scene.registry.client.delete_model_version("chaos", doomed)
        scene.versions.remove(doomed)
        scene.clients.await_answers(5 * CLIENTS)
        scene.point(good)
        scene.await_only(good)
        result.times += 1
    return tally(scene, begun, result)


def too_large(scene: Scene, rng: random.Random) -> Result:
    """The alias on an open model whose weights are twice this machine's memory. The file has no blocks on the disk."""
    scene.await_whole()
    result, begun, folder = Result(), time.monotonic(), copied(scene)
    (folder / MANIFEST).unlink()  # it would say that the weights are those of the copy
    enlarge(folder, 2 * psutil.virtual_memory().total)
    reason = expect_refusal(scene, result, folder, "a model that needs more memory than there is")
    result.expect("MiB of memory" in reason, f"the reason is {reason!r}")
    scene.point(scene.versions[-1])
    return tally(scene, begun, result)


def enlarge(folder: Path, size: int) -> None:
    """Gives a package a width with which its weights have at least that size, all of them zero."""
    config = json.loads((folder / CONFIG).read_text())
    while weights_bytes(config) < size:
        for field in ("hidden_size", "intermediate_size"):
            config[field] *= 2
    (folder / CONFIG).write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in tensor_shapes(parse_config(config)):
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    said = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(said)) + said)
        file.truncate(8 + len(said) + end)


def weights_bytes(config: dict[str, Any]) -> int:
    return sum(4 * math.prod(shape) for _, shape in tensor_shapes(parse_config(config)))


def registry_away(scene: Scene, rng: random.Random) -> Result:
    """The registry is away, answers 500, garbage, or late; meanwhile the alias moves."""
    scene.await_whole()
    several_versions(scene)
    assert scene.gate
    result, begun, gate = Result(), time.monotonic(), scene.gate
    ways: list[Callable[[], AbstractContextManager[None]]] = [
        gate.away,
        lambda: gate.failing(status(500)),
        lambda: gate.failing(garbage),
        lambda: gate.failing(slow(30)),
    ]
    scene.point(scene.versions[0])
    scene.await_only(scene.versions[0])
    rng.shuffle(ways)
    for fails in ways:
        version = rng.choice([one for one in scene.versions if one != scene.clients.answers[-1].version])
        with fails():
            scene.point(version)
            time.sleep(OUTAGE_SECONDS)
        ended = time.monotonic()
        scene.await_only(version)
        result.recovery.append(time.monotonic() - ended)
        result.times += 1
    return tally(scene, begun, result)
