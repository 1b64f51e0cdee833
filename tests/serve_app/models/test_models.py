"""serve_app.models.catalog: loads, leases, swaps, refusals and the canary, with real engines and a real registry."""

import asyncio
import gc
import hashlib
import itertools
import json
import math
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.errors import EngineError
from gptcore.hub import resolve
from gptcore.package import Package, save_package
from gptcore.quantise import quantise_package
from gptcore.sampling import SamplingParams
from serve_app.errors import ApiError
from serve_app.models.catalog import Models, ModelStatus, share_of
from serve_app.models.load import ServedModel
from serve_app.models.registry import Registry
from serve_app.settings import ServeSettings, load_settings
from tests.serve_app.conftest import MakePackage, TestRegistry
from tests.waiting import until

pytestmark = pytest.mark.anyio

NEVER = 3600.0
"""Seconds between polls, for tests that poll themselves."""

numbers = itertools.count()


def settings(uri: str = "sqlite:////nowhere/mlflow.db", **said: Any) -> ServeSettings:
    quick = dict(tracking_uri=uri, poll_seconds=NEVER, slots=2, threads=1, backend="torch", dtype="float32")
    return load_settings(quick | said, environ={})


@asynccontextmanager
async def running(told: ServeSettings, **parts: Any) -> AsyncIterator[Models]:
    models = Models(told, **parts)
    await models.start()
    try:
        yield models
    finally:
        await models.close()


async def said_by(served: ServedModel) -> str:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    request = Request(f"{next(numbers)}", tuple(served.package.tokenizer.encode("Once")), params)
    return "".join([update.text async for update in served.engine.generate(request)])


async def ask(models: Models, name: str | None = None, request_id: str = "r") -> tuple[str, str]:
    """(label of the model that answered, text)"""
    async with models.lease(name, request_id) as served:
        return served.label, await said_by(served)


def status(models: Models, name: str) -> ModelStatus:
    return next(entry for entry in models.describe() if entry.name == name)


class Count:
    """Makes real engines, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, package: Package, settings: EngineSettings) -> Engine:
        self.made += 1
        return Engine(package, settings)


class Watched(Registry):
    """The registry, with a list of its calls."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.asked: list[str] = []

    def version(self, name: str, alias: str) -> str | None:
        self.asked.append(f"{name}@{alias}")
        return super().version(name, alias)


async def test_the_champion_answers_and_its_status_leads_back_to_its_run(registry: TestRegistry):
    version = registry.publish("answering", bits_per_byte=1.75)
    async with running(settings(registry.uri, model="models:/answering@champion")) as models:
        label, text = await ask(models)
        known = status(models, "answering")
    assert label == f"answering@champion v{version}"
    assert text
    assert (known.state, known.version, known.alias, known.default) == ("ready", version, "champion", True)
    assert known.bits_per_byte == 1.75
    assert known.data_fingerprint == "fe" * 32
    assert known.run_id
    assert known.context_length == 128
    assert (known.parameters or 0) > 1000
    assert known.slots == 2
    assert known.error is None


async def test_a_model_loads_on_first_use_and_all_first_requests_share_one_load(make_package: MakePackage):
    count = Count()
    said = f"first={make_package(0).path},second={make_package(1).path}"
    async with running(settings(models=said), make_engine=count) as models:
        assert (count.made, status(models, "second").state) == (1, "unloaded")
        answers = await asyncio.gather(*(ask(models, "second", f"r{i}") for i in range(5)))
        assert count.made == 2
    assert len({label for label, _ in answers}) == 1


async def test_a_client_that_leaves_does_not_cancel_a_load(make_package: MakePackage):
    said = f"first={make_package(0).path},second={make_package(1).path}"
    async with running(settings(models=said)) as models:
        impatient = asyncio.create_task(ask(models, "second"))
        await until(lambda: status(models, "second").state == "loading")
        patient = asyncio.create_task(ask(models, "second"))
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        assert impatient.cancelled()
        assert (await patient)[1]


async def test_models_marked_eager_are_loaded_at_the_start(make_package: MakePackage):
    said = ",".join(f"m{seed}={make_package(seed).path}" for seed in range(3))
    async with running(settings(models=said, eager="m2")) as models:
        assert [entry.state for entry in models.describe()] == ["ready", "unloaded", "ready"]
    async with running(settings(models=said, eager="all")) as models:
        assert [entry.state for entry in models.describe()] == ["ready"] * 3


async def test_a_model_that_cannot_load_says_why_and_the_others_answer(make_package: MakePackage, tmp_path: Path):
    said = f"good={make_package().path},bad={tmp_path / 'missing'}"
    async with running(settings(models=said)) as models:
        for _ in range(2):  # the second answer is cached
            with pytest.raises(ApiError, match="'bad' is not ready: there is no model") as caught:
                await ask(models, "bad")
            assert (caught.value.status, caught.value.code) == (503, "model_not_ready")
            assert int(caught.value.headers["retry-after"]) >= 1
        known = status(models, "bad")
        assert known.state == "failed"
        assert "there is no model" in (known.error or "")
        assert (await ask(models, "good"))[1]


async def test_a_model_that_failed_is_tried_again_later(make_package: MakePackage, tmp_path: Path):
    said = f"good={make_package().path},late={tmp_path / 'late'}"
    async with running(settings(models=said, poll_seconds=0.01)) as models:
        with pytest.raises(ApiError):
            await ask(models, "late")
        source = make_package(3)
        save_package(
            tmp_path / "late", source.config, source.load_model().state_dict(), source.tokenizer, {"bits_per_byte": 2}
        )
        async with asyncio.timeout(60):
            while status(models, "late").state != "ready":
                await asyncio.gather(ask(models, "late"), return_exceptions=True)
        assert status(models, "late").error is None


async def test_an_unknown_model_is_refused_with_the_nearest_name(package: Package):
    async with running(settings(models=f"story={package.path}")) as models:
        with pytest.raises(ApiError, match="Did you mean 'story'") as caught:
            await ask(models, "storey")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


async def test_after_a_promotion_running_requests_finish_on_the_old_version(
    registry: TestRegistry,
):
    first = registry.publish("followed", seed=1)
    heard: list[tuple[str, bool]] = []
    async with running(settings(registry.uri, model="models:/followed@champion")) as models:
        models.on_reload(lambda name, succeeded: heard.append((name, succeeded)))
        before = await ask(models)
        async with models.lease(None, "in flight") as old:
            second = registry.publish("followed", seed=2)
            await models.poll()
            label, text = await ask(models)
            assert label == f"followed@champion v{second}"
            assert text != before[1]
            assert {served.version for served in models.loaded()} == {first, second}
            assert await said_by(old) == before[1]
            assert old.version == first
        await models.left()
        assert not old.engine.alive
        assert [served.version for served in models.loaded()] == [second]
    assert heard == [("followed", True)]


async def test_the_same_version_gives_the_same_text_after_a_reload(registry: TestRegistry):
    first = registry.publish("steady", seed=1)
    async with running(settings(registry.uri, model="models:/steady@champion")) as models:
        before = await ask(models)
        registry.publish("steady", seed=2)
        await models.poll()
        registry.point("steady", first)
        await models.poll()
        assert await ask(models) == before


async def test_a_replaced_engine_is_freed(registry: TestRegistry):
    registry.publish("freed", seed=1)
    engines: list[weakref.ref[Engine]] = []

    def make(package: Package, told: EngineSettings) -> Engine:
        engine = Engine(package, told)
        engines.append(weakref.ref(engine))
        return engine

    async with running(settings(registry.uri, model="models:/freed@champion"), make_engine=make) as models:
        await ask(models)
        registry.publish("freed", seed=2)
        await models.poll()
        await models.left()
        gc.collect()
        assert [engine() is None for engine in engines] == [True, False]


async def test_a_broken_version_is_refused_and_reported_once_and_the_old_one_stays(registry: TestRegistry):
    first = registry.publish("sturdy", seed=1)
    heard: list[tuple[str, bool]] = []
    asked = Watched(registry.uri)
    async with running(settings(registry.uri, model="models:/sturdy@champion"), registry=asked) as models:
        models.on_reload(lambda name, succeeded: heard.append((name, succeeded)))
        broken = registry.publish("sturdy", seed=2, promote="never")
        registry.spoil("sturdy", broken)
        registry.point("sturdy", broken)
        await models.poll()
        await models.poll()
        known = status(models, "sturdy")
        assert (known.state, known.version) == ("ready", first)
        assert "altered or cut short" in known.refused[broken]
        assert known.error == f"version {broken} was refused: {known.refused[broken]}"
        assert (await ask(models))[0] == f"sturdy@champion v{first}"
        assert heard == [("sturdy", False)]  # the second poll remembered
        assert len(asked.asked) == 3

        good = registry.publish("sturdy", seed=3)
        await models.poll()
        known = status(models, "sturdy")
        assert (known.version, known.error) == (good, None)
        assert heard[-1] == ("sturdy", True)


async def test_a_version_that_computes_nan_is_refused(make_package: MakePackage, tmp_path: Path):
    source = make_package()
    state = {name: torch.full_like(value, math.nan) for name, value in source.load_model().state_dict().items()}
    save_package(tmp_path / "nan", source.config, state, source.tokenizer, {})
    async with running(settings(model=str(tmp_path / "nan"))) as models:
        known = status(models, "nan")
        assert known.state == "failed"
        assert "are not finite" in (known.error or "")


async def test_a_replica_that_starts_with_a_broken_champion_serves_the_previous_one(registry: TestRegistry):
    first = registry.publish("heir", seed=1)
    broken = registry.publish("heir", seed=2)
    registry.spoil("heir", broken)
    async with running(settings(registry.uri, model="models:/heir@champion")) as models:
        known = status(models, "heir")
        assert (known.state, known.version) == ("ready", first)
        assert (known.error or "").startswith(f"version {broken} was refused")
        await models.poll()
        assert (await ask(models))[0] == f"heir@champion v{first}"


async def test_a_refused_version_is_reported_while_another_one_answers(registry: TestRegistry):
    first, second = registry.publish("flaky", seed=1), registry.publish("flaky", seed=2)

    seen: list[bytes] = []

    def make(package: Package, settings: EngineSettings) -> Engine:
        seen.append((package.path / "model.safetensors").read_bytes())
        if seen[-1] == seen[0]:  # the champion's, which is tried first
            raise MemoryError("not now")
        return Engine(package, settings)

    told = settings(registry.uri, model="models:/flaky@champion", poll_seconds=0.02)  # less than a load takes
    async with running(told, make_engine=make) as models:
        assert status(models, "flaky").version == first
        assert status(models, "flaky").error == f"version {second} was refused: MemoryError: not now"


async def test_a_service_without_a_champion_waits_for_one(registry: TestRegistry):
    registry.publish("awaited", promote="never")
    async with running(settings(registry.uri, model="models:/awaited@champion")) as models:
        assert not models.ready
        with pytest.raises(ApiError, match="no version of the registered model 'awaited' has the alias 'champion'"):
            await ask(models)
        registry.point("awaited", "1")
        await models.poll()
        assert models.ready
        assert (await ask(models))[1]


async def test_without_the_registry_the_model_answers_and_follows_the_alias_again_later(registry: TestRegistry):
    first = registry.publish("patient", seed=1)
    second = registry.publish("patient", seed=2, promote="never")
    database = Path(registry.uri.removeprefix("sqlite:///"))
    async with running(settings(registry.uri, model="models:/patient@champion")) as models:
        registry.point("patient", second)
        database.rename(database.with_suffix(".away"))
        try:
            await models.poll()
            known = status(models, "patient")
            assert (known.state, known.version) == ("ready", first)
            assert (known.error or "").startswith("cannot ask where")
            assert (await ask(models))[0] == f"patient@champion v{first}"
        finally:
            database.with_suffix(".away").rename(database)
        await models.poll()
        assert (await ask(models))[0] == f"patient@champion v{second}"
        assert status(models, "patient").error is None


async def test_a_starting_replica_waits_for_a_registry_that_is_down(registry: TestRegistry):
    registry.publish("early")
    database = Path(registry.uri.removeprefix("sqlite:///"))
    database.rename(database.with_suffix(".away"))
    models = Models(settings(registry.uri, model="models:/early@champion", poll_seconds=0.05))
    starting = asyncio.create_task(models.start())
    try:
        async with asyncio.timeout(30):
            await until(lambda: status(models, "early").error)
        assert not starting.done()
    finally:
        database.with_suffix(".away").rename(database)
    await starting
    assert models.ready
    await models.close()


async def test_sources_that_cannot_change_are_never_looked_up(registry: TestRegistry, package: Package):
    version = registry.publish("pinned")
    asked = Watched(registry.uri)
    said = f"pinned=models:/pinned/{version},folder={package.path}"
    async with running(settings(registry.uri, models=said, eager="all"), registry=asked) as models:
        await models.poll()
        assert (await ask(models))[0] == f"pinned v{version}"
        assert status(models, "pinned").alias is None
    assert asked.asked == []


async def test_a_folders_version_is_a_hash_of_its_content(make_package: MakePackage):
    said = f"a={make_package(1).path},b={make_package(1).path}/.,c={make_package(2).path}"
    async with running(settings(models=said, eager="all")) as models:
        a, b, c = (entry.version for entry in models.describe())
        assert status(models, "a").bits_per_byte == 2.5
    assert a == b != c
    assert len(a or "") == 12


async def test_a_champion_with_stored_weights_follows_and_answers_as_if_they_were_quantised_at_load(
    registry: TestRegistry, make_package: MakePackage, tmp_path: Path
):
    full = make_package(3)
    small = quantise_package(full, tmp_path / "small", "int4")
    stored = replace(registry, make_package=lambda *_, **__: small)
    registry.publish("stored", seed=1)
    async with running(settings(registry.uri, model="models:/stored@champion", backend="native")) as models:
        assert models.describe()[0].weights is None
        assert stored.publish("stored") == "2"  # MLflow has run it once
        await models.poll()
        label, text = await ask(models)
        assert (label, models.describe()[0].weights) == ("stored@champion v2", "int4")
    async with running(settings(model=str(full.path), backend="native", weights="int4")) as models:
        assert (await ask(models))[1] == text
    async with running(settings(model=str(small.path), backend="native", weights="int8")) as models:
        with pytest.raises(ApiError, match="stores int4"):
            await ask(models)


async def test_two_names_for_one_source_share_an_engine_and_keep_their_names(package: Package):
    count = Count()
    async with running(settings(models=f"a={package.path},b={package.path}", eager="all"), make_engine=count) as models:
        async with models.lease("a", "r") as a, models.lease("b", "r") as b:
            assert (a.name, b.name) == ("a", "b")
            assert a.engine is b.engine
        assert count.made == 1


async def test_a_candidate_gets_its_share_of_the_default_models_requests_by_their_ids(
    registry: TestRegistry, package: Package
):
    champion, candidate = registry.publish("shared", seed=1), registry.publish("shared", seed=2, promote="never")
    registry.point("shared", candidate, alias="candidate")
    said = settings(
        registry.uri,
        models=f"shared=models:/shared@champion,other={package.path}",
        canary="models:/shared@candidate:0.25",
    )
    ids = [f"request-{i}" for i in range(2000)]

    async def versions(models: Models, name: str | None) -> list[str]:
        answered = []
        for request_id in ids:
            async with models.lease(name, request_id) as served:
                answered.append(served.version)
        return answered

    async with running(said) as models:
        answered = await versions(models, None)
        assert 0.22 < answered.count(candidate) / len(ids) < 0.28
        assert set(answered) == {champion, candidate}
        assert answered == await versions(models, "shared")
        assert answered == [candidate if share_of(i) < 0.25 else champion for i in ids]
        assert set(await versions(models, "shared@candidate")) == {candidate}
        assert champion not in await versions(models, "other")
        assert status(models, "shared@candidate").canary_share == 0.25
        registry.client.delete_registered_model_alias("shared", "candidate")
        await models.poll()
        assert set(await versions(models, None)) == {champion}
        await models.left()
        assert len(models.loaded()) == 2


async def test_if_a_canary_cannot_load_the_default_model_answers(registry: TestRegistry):
    version = registry.publish("alone")
    said = settings(registry.uri, model="models:/alone@champion", canary="models:/alone@candidate:1.0")
    async with running(said) as models:
        assert models.ready
        assert (await ask(models))[0] == f"alone@champion v{version}"
        assert status(models, "alone@candidate").state == "failed"


async def test_a_dead_engine_fails_the_health_check(package: Package):
    async with running(settings(model=str(package.path))) as models:
        models.check_health()
        async with models.lease(None, "r") as served:

            def burst(*_: object) -> None:
                raise RuntimeError("burst")

            served.engine.engine.step = burst  # type: ignore[method-assign]
            await said_by(served)
        assert not models.ready
        with pytest.raises(EngineError, match="has died"):
            models.check_health()


async def test_closing_lets_requests_finish(package: Package):
    models = Models(settings(model=str(package.path)))
    await models.start()
    expected = (await ask(models))[1]
    admitted = asyncio.Event()

    async def slow() -> str:
        async with models.lease(None, "slow") as served:
            admitted.set()
            return await said_by(served)

    request = asyncio.create_task(slow())
    await admitted.wait()
    await models.close()
    assert await request == expected
    assert models.loaded() == []
    with pytest.raises(ApiError, match="the service is closing"):
        await ask(models)
    assert models.loaded() == []


async def test_aliases_are_followed_in_the_background(registry: TestRegistry):
    registry.publish("watched", seed=1)
    moved = asyncio.Event()
    async with running(settings(registry.uri, model="models:/watched@champion", poll_seconds=0.1)) as models:
        models.on_reload(lambda name, succeeded: moved.set())
        second = registry.publish("watched", seed=2)
        async with asyncio.timeout(30):
            await moved.wait()
        assert (await ask(models))[0] == f"watched@champion v{second}"


def test_shares_are_even_and_depend_on_the_id_alone():
    shares = [share_of(f"{i}") for i in range(10_000)]
    assert shares == [share_of(f"{i}") for i in range(10_000)]
    assert all(0 <= share < 1 for share in shares)
    for tenth in range(10):
        assert 900 < sum(tenth / 10 <= share < (tenth + 1) / 10 for share in shares) < 1100


async def test_a_version_with_wrong_contents_is_refused_for_good_and_the_old_one_answers(registry: TestRegistry):
    first = registry.publish("honest", seed=1)
    async with running(settings(registry.uri, model="models:/honest@champion")) as models:
        liar = registry.publish("honest", seed=2)
        folder = resolve(f"models:/honest/{liar}", registry.uri)
        lies: list[tuple[str, Any]] = [
            ("max_position_embeddings", 10**9),
            ("num_hidden_layers", 3_000_000),
            ("num_attention_heads", "two"),
        ]
        for key, value in lies:
            config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", "foundry.json"))
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            manifest["files"]["config.json"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
            (folder / "foundry.json").write_text(json.dumps(manifest))
            models._models["honest"].refused.clear()
            await models.poll()
            known = status(models, "honest")
            assert (known.state, known.version) == ("ready", first)
            assert f"config.json: {key} is {value!r}; expected a whole number" in known.refused[liar]
            assert models._models["honest"].refused[liar].retry_at == math.inf
            (folder / "config.json").write_text(json.dumps(config))
        assert (await ask(models))[0] == f"honest@champion v{first}"
