"""A request gets the text of the model and its parameters, ends where it should, and leaves nothing behind."""

from dataclasses import replace

import pytest
import torch

from gptcore.engine.engine import Engine
from gptcore.engine.interface import FinishReason, Request
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.package import Package
from gptcore.sampling import SamplingParams

from .conftest import CONTEXT, SPARE, VOCAB, Answer, FakeRunner, MakeEngine, ScriptedRunner, alone, run

EOT = VOCAB - 1
GREEDY = SamplingParams(temperature=0, max_new_tokens=50)


def request(name: str, prompt: str | tuple[int, ...] = "a", params: SamplingParams = GREEDY, **more: bool) -> Request:
    return Request(name, tuple(prompt.encode()) if isinstance(prompt, str) else prompt, params, **more)


def say(engine: Engine, params: SamplingParams = GREEDY, prompt: str = "a") -> Answer:
    return run(engine, request("one", prompt, params))["one"]


# What is said.


def test_a_sequence_follows_from_the_model_and_the_seed(make_engine: MakeEngine) -> None:
    params = SamplingParams(seed=7, max_new_tokens=30, top_k=50, temperature=0.8, ignore_eos=True)
    answer = say(make_engine(), params, "the way it begins")
    assert answer.tokens == alone(FakeRunner(), b"the way it begins", params, eot=-1)
    assert len(answer.tokens) == 30


def test_without_a_seed_each_request_draws_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    answers = run(engine, *(request(f"{i}", "the same", params) for i in range(4)))
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 4


def test_every_token_arrives_with_its_step_and_the_text_adds_up(make_engine: MakeEngine) -> None:
    script = "süß – 日本 🙂!".encode()
    answer = say(make_engine(ScriptedRunner(script)))
    assert [len(update.token_ids) for update in answer.updates] == [1] * (len(script) + 1)
    assert answer.tokens == [*script, EOT]
    assert answer.text == script.decode()
    assert "�" not in answer.text


def test_padding_ids_after_the_vocabulary_are_never_chosen(make_engine: MakeEngine) -> None:
    params = SamplingParams(seed=1, max_new_tokens=100, ignore_eos=True)
    assert max(say(make_engine(), params).tokens) < VOCAB < VOCAB + SPARE


# Where it ends.


def test_the_end_of_text_token_ends_the_text_and_is_not_part_of_it(make_engine: MakeEngine) -> None:
    answer = say(make_engine(ScriptedRunner(b"over")))
    assert (answer.text, answer.reason, answer.tokens[-1]) == ("over", "stop", EOT)
    assert isinstance(answer.reason, FinishReason)


def test_the_end_of_text_token_can_be_ignored(make_engine: MakeEngine) -> None:
    answer = say(make_engine(ScriptedRunner(b"over")), replace(GREEDY, ignore_eos=True, max_new_tokens=9))
    assert (len(answer.tokens), answer.reason) == (9, "length")


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(make_engine: MakeEngine) -> None:
    answer = say(make_engine(ScriptedRunner(b"one, two, three")), replace(GREEDY, stop_token_ids=(ord(","), ord("x"))))
    assert (answer.text, answer.reason) == ("one", "stop")


@pytest.mark.parametrize("stop", ["two", ", t", "o, t"])
def test_a_stop_string_ends_the_text_and_no_character_of_it_is_shown(make_engine: MakeEngine, stop: str) -> None:
    answer = say(make_engine(ScriptedRunner(b"one, two, three")), replace(GREEDY, stop=(stop, "never")))
    before = "one, two, three".split(stop)[0]
    assert (answer.text, answer.reason) == (before, "stop")
    assert len(answer.tokens) == len(before + stop), "it went on"


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(make_engine: MakeEngine) -> None:
    for params in (GREEDY, replace(GREEDY, max_new_tokens=4)):
        answer = say(make_engine(ScriptedRunner(b"half")), replace(params, stop=("alfalfa",)))
        assert answer.text == "half"


def test_max_new_tokens_ends_the_text(make_engine: MakeEngine) -> None:
    answer = say(make_engine(ScriptedRunner(b"one, two, three")), replace(GREEDY, max_new_tokens=5))
    assert (answer.text, answer.reason, len(answer.tokens)) == ("one, ", "length", 5)


@pytest.mark.parametrize("length", [1, CONTEXT - 2, CONTEXT - 1])
def test_a_full_context_ends_the_text(make_engine: MakeEngine, length: int) -> None:
    params = SamplingParams(seed=1, max_new_tokens=10_000, ignore_eos=True)
    answer = run(make_engine(), request("long", (5,) * length, params))["long"]
    assert (len(answer.tokens), answer.reason) == (CONTEXT - length, "length")


# Who shares what.


def test_choices_of_one_prompt_compute_the_prompt_once(make_engine: MakeEngine) -> None:
    runner = FakeRunner(slots=8)
    engine = make_engine(runner, prefill_tokens=32)
    prompt = "a prompt that is long enough to be worth sharing by its choices."
    params = [SamplingParams(seed=i, max_new_tokens=9, ignore_eos=True) for i in range(6)]
    answers = run(engine, *(request(f"{i}", prompt, p) for i, p in enumerate(params)))
    for i, p in enumerate(params):
        assert answers[f"{i}"].tokens == alone(runner, prompt.encode(), p, eot=-1)
        assert answers[f"{i}"].cached == (len(prompt) - 1 if i else 0)
    computed = sum(len(chunk.tokens) for step in runner.steps for chunk in step)
    assert computed == len(prompt) + 5 + 6 * 8  # once, each other's last token, and the decodes


def test_a_conversation_reuses_what_was_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(slots=2))
    params = SamplingParams(seed=3, max_new_tokens=20, ignore_eos=True)
    first = run(engine, request("first", "What is the answer? ", params))["first"]
    longer = (*b"What is the answer? ", *first.tokens, *b" Why?")
    second = run(engine, request("second", longer, params))["second"]
    assert second.cached == 20 + 19  # the last token was sampled and never run
    assert second.tokens == alone(FakeRunner(), longer, params, eot=-1)
    assert engine.stats().cached_tokens_reused_total == 39


def test_without_the_prefix_cache_every_prompt_is_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_cache=False)
    for name in "ab":
        assert run(engine, request(name, "x" * 60))[name].cached == 0


# Leaving, and not getting in.


def test_an_abort_frees_the_slot_at_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"one, two, three", slots=1))
    run(engine, request("first"), request("second"), steps=3)
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    engine.abort("first")
    last, first_of_second = engine.step()
    assert (last.request_id, last.finish_reason, last.generated_tokens) == ("first", "abort", 3)
    assert (first_of_second.request_id, first_of_second.text) == ("second", "o")
    engine.check()


def test_a_request_can_be_aborted_while_it_waits_and_during_its_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(slots=1), prefill_tokens=16)
    run(engine, request("reads", "x" * 60), request("waits"), steps=2)
    engine.abort("waits")
    engine.abort("reads")
    engine.abort("reads")
    assert {(update.request_id, update.finish_reason) for update in engine.step()} == {
        ("reads", "abort"),
        ("waits", "abort"),
    }
    assert not engine.busy
    engine.check()
    assert run(engine, request("next", "x" * 60))["next"].cached == 32


def test_aborting_an_unknown_request_does_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"fine"))
    engine.abort("one")
    assert engine.step() == []
    engine.abort("one")
    assert say(engine).text == "fine"


def test_all_requests_can_be_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(slots=1))
    run(engine, request("a"), request("b"), steps=1)
    engine.abort_all()
    assert {update.request_id for update in engine.step()} == {"a", "b"}
    assert not engine.busy


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ((), {}, "prompt", "empty"),
        ((1,) * CONTEXT, {}, "prompt", f"{CONTEXT} tokens long.*at most {CONTEXT - 1} fit"),
        ((1, VOCAB), {}, "prompt", f"token id {VOCAB}; this model's go from 0 to {VOCAB - 1}"),
        ((-1,), {}, "prompt", "token id -1"),
        ((1,), {"stop_token_ids": (3, 999)}, "stop_token_ids", "token id 999"),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_refused_with_the_parameters_name(
    make_engine: MakeEngine, prompt: tuple[int, ...], params: dict, param: str, message: str
) -> None:
    engine = make_engine()
    with pytest.raises(ConfigError, match=message) as caught:
        engine.add(request("bad", prompt, replace(GREEDY, **params)))
    assert caught.value.param == param
    assert not engine.busy


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"fine"))
    engine.add(request("one"))
    with pytest.raises(ConfigError, match="'one' is in use"):
        engine.add(request("one"))
    run(engine)
    assert say(engine).text == "fine"


def test_a_full_queue_refuses_new_requests_and_keeps_the_others(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(slots=2), max_queue=3)
    for i in range(5):
        engine.add(request(f"{i}"))
    with pytest.raises(QueueFull, match="no more than 3"):
        engine.add(request("5"))
    assert set(run(engine)) == {"0", "1", "2", "3", "4"}


def test_an_update_says_how_long_the_request_waited(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 10_000))
    monkeypatch.setattr("gptcore.engine.engine.time.monotonic", lambda: float(next(clock)))
    answers = run(make_engine(ScriptedRunner(b"ab", slots=1)), request("first"), request("second"))
    # Each arrival and each step takes a second: 100, 101, then steps; three for the first.
    assert [answers[name].updates[0].queue_seconds for name in ("first", "second")] == [2.0, 4.0]


# What else is told.


def test_logprobs_are_the_models_own_whatever_is_sampled_from(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    params = SamplingParams(seed=3, max_new_tokens=12, temperature=0.5, top_k=3, logprobs=2, ignore_eos=True)
    answer = say(make_engine(runner), params)
    state = runner.follow(0, ord("a"))
    assert len(answer.logprobs) == len(answer.tokens) == 12
    for token, entry in zip(answer.tokens, answer.logprobs, strict=True):
        expected = runner.logits([state])[0, :VOCAB].log_softmax(0)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-5)
        assert [top.token_id for top in entry.top] == expected.topk(2).indices.tolist()
        assert bytes(entry.bytes) == (bytes([token]) if token < 256 else b"")  # an end of text adds nothing to it
        assert token < 256 or entry.text == "<|endoftext|>"
        state = runner.follow(state, token)


@pytest.mark.parametrize("prefill", [16, 256])
def test_prompt_logprobs_come_with_the_first_update_one_per_token(make_engine: MakeEngine, prefill: int) -> None:
    runner = FakeRunner()
    engine = make_engine(runner, prefill_tokens=prefill)
    prompt = tuple(b"how likely is all of this, and is it so again?")
    params = SamplingParams(seed=1, logprobs=1, max_new_tokens=3, ignore_eos=True)
    for name in ("once", "again"):
        answer = run(engine, request(name, prompt, params, prompt_logprobs=True))[name]
        first, *others = answer.updates
        assert [entry.token_id for entry in first.prompt_logprobs] == list(prompt)
        assert not any(update.prompt_logprobs for update in others)
        assert answer.cached == 0
        assert first.prompt_logprobs[0].logprob is None
        state = 0
        for token, entry in zip(prompt[:-1], first.prompt_logprobs[1:], strict=True):
            state = runner.follow(state, token)
            expected = runner.logits([state])[0, :VOCAB].log_softmax(0)
            assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-5)
            assert len(entry.top) == 1
        assert answer.tokens == alone(runner, prompt, params, eot=-1)


def test_stats_count_what_was_done(make_engine: MakeEngine) -> None:
    engine = make_engine(ScriptedRunner(b"abc", prompt_length=3, slots=2))
    for i in range(3):
        engine.add(request(f"{i}", "xyz"))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.slots, stats.slots_used) == (2, 1, 2, 2)
    while engine.busy:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)
    assert (stats.prompt_tokens_total, stats.generated_tokens_total, stats.steps_total) == (9, 12, 8)


def test_the_check_finds_a_lost_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run(engine, request("lost"), steps=1)
    del engine._active["lost"]
    with pytest.raises(EngineError, match="lost"):
        engine.check()


def test_warming_up_leaves_no_trace_and_refuses_a_broken_model(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    engine.warm_up()
    assert len(runner.steps) == 2
    assert engine.stats().steps_total == 0
    params = SamplingParams(seed=7, max_new_tokens=9)
    assert say(engine, params).tokens == alone(runner, b"a", params)
    runner._logits[:, 3] = torch.nan
    with pytest.raises(EngineError, match="are not finite"):
        engine.warm_up()


def test_an_engine_is_not_warmed_up_while_it_works(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("one"))
    with pytest.raises(EngineError, match="open"):
        engine.warm_up()


def test_encoding_an_empty_text_gives_no_tokens(fake_package: Package, make_engine: MakeEngine) -> None:
    assert make_engine().encode("") == ()
    assert make_engine().encode("ab") == (97, 98)


def test_a_model_of_one_position_is_warmed_up_with_one_token(make_engine: MakeEngine) -> None:
    """The native runner crashed on the empty prompt that was left of it."""
    runner = FakeRunner()
    runner.context_length = 1
    make_engine(runner).warm_up()
    assert len(runner.steps) == 1
