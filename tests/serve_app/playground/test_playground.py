"""The playground in a real Chromium against the real service: what a user sees and does."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from serve_app.http.routes.playground import FOLDER
from serve_app.http.schemas import GenerateRequest
from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage
from tests.serve_app.playground.browser import ended, open_page, run
from tests.serve_app.playground.conftest import needs_chromium
from tests.serve_app.running import Running, running
from tests.waiting import eventually

LONG, KEY = 4000, "key-of-the-playgrounds-test"
BROKEN_WORDS = """() => [...document.querySelectorAll(".lineage :is(dt, dd)")].flatMap((cell) =>
  [...cell.childNodes].flatMap((node) => [...node.textContent.matchAll(/[\\w.]+/g)].filter((word) => {
    if (node.nodeType !== Node.TEXT_NODE) return false;
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    return range.getClientRects().length > 1;
  }).map(String)))"""
"""Words of the lineage that are on more than one line."""
MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


RUN_URL = "http://127.0.0.1:5000/#/experiments/1/runs/0"
# What the packages of conftest.py say of their training, as the page shows it.
LINEAGE = {"MLflow run": "0" * 12, "Bits per byte": "2.5000", "Data fingerprint": "fe" * 6}


@pytest.fixture(scope="module")
def models(make_package: MakePackage) -> tuple[str, ...]:
    """Two models as in `GPT_MODELS`, slow enough for a user to press Stop."""
    shape = dict(hidden_size=256, num_layers=4, num_heads=4, context_length=LONG + 100)
    return tuple(f"{name}={make_package(seed, **shape).path}" for seed, name in enumerate(("tiny", "other")))


@pytest.fixture(scope="module")
def running_service(models: tuple[str, ...]) -> Iterator[Running]:
    with running(ServeSettings(models=models, max_new_tokens=LONG, log_level="warning")) as service:
        yield service


@pytest.fixture
def service(running_service: Running) -> str:
    """The address of a service with two models and no key."""
    return running_service.url


def answer_with(page: Page, *events: dict[str, Any], end: str = "data: [DONE]\n\n") -> None:
    """Makes the service's next answers these events, for texts that no small model would generate."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end

    def fulfill(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/generate", fulfill)


def event(text: str, *tokens: bytes, reason: str | None = None, logprob: float = -0.7) -> dict[str, Any]:
    """One event of a stream, with a token for each of `tokens`."""
    logprobs = [
        {"token_id": i, "text": token.decode(errors="replace"), "bytes": list(token), "logprob": logprob, "top": []}
        for i, token in enumerate(tokens)
    ]
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}
    return {"id": "gen-1", "model": "tiny", "version": "1", "seed": 1, "choices": [choice]}


def text_of(page: Page, pane: int = 0) -> str:
    return page.locator(".pane .text").nth(pane).text_content() or ""


# --- without a browser ---


def test_page_and_assets_are_served_with_type_policy_and_etag(service: str) -> None:
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in FOLDER.iterdir():
        url = f"{service}/" if path.name == "index.html" else f"{service}/playground/{path.name}"
        reply = httpx2.get(url)
        assert reply.status_code == 200
        assert reply.content == path.read_bytes()
        assert reply.headers["content-type"].startswith(types[path.suffix[1:]])
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        again = httpx2.get(url, headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["playground/missing.js", "playground/..%2Fsettings.py", "playground/__init__.py"])
def test_only_the_pages_own_files_are_served(service: str, path: str) -> None:
    reply = httpx2.get(f"{service}/{path}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "route_not_found"


def test_no_file_of_the_page_refers_to_another_host() -> None:
    for path in FOLDER.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()))
        assert addresses <= {"http://www.w3.org"}, path.name  # the namespace of SVG


# --- in the browser ---


@needs_chromium
def test_text_appears_while_it_is_generated(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=LONG, ignore_eos="true")
    page.get_by_role("button", name="Run").click()
    tokens = page.locator(".token")
    expect(tokens.first).to_be_attached()
    early = tokens.count()
    assert page.locator(".pane.running").count() == 1
    expect(tokens.nth(early + 5)).to_be_attached()
    assert page.locator(".output").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator(".output")).to_have_attribute("aria-busy", "false")


@needs_chromium
def test_shown_text_equals_the_apis_for_the_same_seed(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=40, seed=11, temperature=1.2, top_k=50)
    run(page)
    body = {"prompt": "The", "max_new_tokens": 40, "seed": 11, "temperature": 1.2, "top_k": 50}
    reply = httpx2.post(f"{service}/generate", json=body).json()
    assert text_of(page) == reply["choices"][0]["text"]
    figures = page.locator(".figures").inner_text()
    assert f"tokens\n{reply['usage']['completion_tokens']}" in figures
    assert re.search(r"first token\n\d+ ms", figures)
    assert re.search(r"speed\n\d+ tokens/s", figures)
    assert "seed\n11" in figures


@needs_chromium
@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_ends_the_text_and_frees_the_slot(page: Page, running_service: Running, by: str) -> None:
    service = running_service.url
    open_page(page, service, prompt="The", max_new_tokens=LONG, ignore_eos="true")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator(".token").nth(3)).to_be_attached()
    assert running_service.stats.running == 1
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    ended(page)
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert 0 < page.locator(".token").count() < LONG
    eventually(lambda: running_service.stats.slots_used == 0, "the slot is free")


@needs_chromium
def test_pointing_at_a_token_shows_its_probability_and_alternatives(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=60, seed=3, logprobs=4, ignore_eos="true")
    run(page)
    card = page.get_by_role("tooltip")
    expect(card).to_be_hidden()
    readable(page).nth(2).hover()
    expect(card).to_be_visible()
    for token in card.get_by_role("list").all():  # several where a character is made of several tokens
        shares = [float(share.strip("<%")) for share in token.locator(".share").all_inner_texts()]
        assert len(shares) in (4, 5)  # the chosen token is one of the likeliest, or comes after them
        assert shares[:4] == sorted(shares[:4], reverse=True)
        expect(token.locator(".chosen")).to_have_count(1)
    page.get_by_label("Prompt").hover()
    expect(card).to_be_hidden()


@needs_chromium
def test_tokens_can_be_walked_with_the_arrow_keys(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=30, seed=3, ignore_eos="true")
    run(page)
    tokens, card = page.locator(".token"), page.get_by_role("tooltip")
    tokens.first.focus()
    expect(card).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tokens.nth(1)).to_have_attribute("aria-describedby", "card")
    readable(page).last.click()
    assert page.locator(".token[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()


@needs_chromium
def test_tokens_are_tinted_on_request_and_unlikely_ones_are_warmer(page: Page, service: str) -> None:
    answer_with(page, event("sure", b"sure", logprob=-0.01), event("odd", b"odd", reason="length", logprob=-9.0))
    open_page(page, service, prompt="The")
    run(page)
    sure, odd = page.locator(".token").all()
    assert background(sure) == background(odd)
    expect(page.locator("#scale")).to_be_hidden()
    page.get_by_label("Tint by probability").check()
    assert background(sure) != background(odd)
    expect(page.locator("#scale")).to_be_visible()


@needs_chromium
def test_an_empty_prompt_offers_examples_that_never_replace_typed_text(page: Page, service: str) -> None:
    open_page(page, service, max_new_tokens=8, ignore_eos="true")
    examples = page.locator("#examples")
    expect(examples.get_by_role("button")).to_have_count(5)
    examples.get_by_role("button", name="Once upon a time").click()
    ended(page)
    expect(page.locator(".given")).to_have_text("Once upon a time")
    assert text_of(page)
    expect(examples).to_be_hidden()
    page.get_by_label("Prompt").fill("")
    expect(examples).to_be_visible()


@needs_chromium
@pytest.mark.parametrize("width", [1280, 360])
def test_a_models_origin_is_folded_away_and_breaks_no_word(
    new_page: Callable[..., Page], service: str, width: int
) -> None:
    page = new_page(viewport={"width": width, "height": 840})
    words = ["quick brown foxes", "a-name-of-thirty-characters.txt", "/a/path/of/some/length/to/a/package"]

    def named(route: Route) -> None:
        listing = route.fetch().json()
        source, data = words[2], f"{words[0]} {words[1]}"
        route.fulfill(json={"models": [entry | {"source": source, "data": data} for entry in listing["models"]]})

    page.route("**/models", named)
    open_page(page, service, prompt="The")
    lineage = page.locator(".lineage")
    expect(lineage.locator("dl")).to_be_hidden()
    page.get_by_text("Where this model comes from").click()
    expect(lineage.locator("dl")).to_be_visible()
    assert page.evaluate(BROKEN_WORDS) == []


@needs_chromium
def test_two_models_answer_one_prompt_side_by_side(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=20, seed=5)
    page.get_by_label("Compare two").check()
    assert page.locator(".model").evaluate_all("all => all.map((one) => one.value)") == ["tiny", "other"]
    run(page)
    for pane, model in enumerate(["tiny", "other"]):
        body = {"prompt": "The", "max_new_tokens": 20, "seed": 5, "model": model}
        reply = httpx2.post(f"{service}/generate", json=body).json()
        assert text_of(page, pane) == reply["choices"][0]["text"]
        expect(page.locator(".facts").nth(pane)).to_contain_text(f"version {reply['version']}")
    left, right = (box for pane in page.locator(".pane").all() if (box := pane.bounding_box()))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


@needs_chromium
def test_an_answer_links_to_the_run_of_its_model(page: Page, service: str) -> None:
    def with_run_url(route: Route) -> None:  # only a tracking server has pages to link to
        listing = route.fetch().json()
        route.fulfill(json={"models": [entry | {"run_url": RUN_URL} for entry in listing["models"]]})

    page.route("**/models", with_run_url)
    open_page(page, service, prompt="The")
    page.get_by_text("Where this model comes from").click()
    lineage = page.locator(".lineage dl")
    for name, value in LINEAGE.items():
        expect(lineage.locator("div", has=page.locator("dt", has_text=name)).locator("dd")).to_have_text(value)
    expect(lineage.get_by_role("link")).to_have_attribute("href", RUN_URL)


@needs_chromium
def test_an_answer_from_another_model_or_version_says_so(page: Page, service: str) -> None:
    answer_with(page, event("from the canary", b"from the canary", reason="stop") | {"model": "other", "version": "9"})
    open_page(page, service, prompt="The", model="tiny")
    run(page)
    expect(page.locator(".figures")).to_contain_text("other version 9")


@needs_chromium
def test_a_refused_setting_is_named_and_marked(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=10)
    field = page.get_by_role("spinbutton", name="Temperature")
    field.fill("-3")
    page.get_by_role("button", name="Run").click()
    ended(page)
    expect(page.locator(".pane [role=alert]")).to_contain_text("temperature is -3")
    expect(field).to_have_attribute("aria-invalid", "true")
    field.fill("0.5")
    expect(field).not_to_have_attribute("aria-invalid", "true")
    run(page)
    expect(page.locator(".pane [role=alert]")).to_be_hidden()


@needs_chromium
@pytest.mark.parametrize(
    ("end", "shown"),
    [('data: {"error": {"message": "the engine failed"}}\n\n', "the engine failed"), ("", "The connection was lost")],
)
def test_an_interrupted_stream_keeps_its_text_and_says_so(page: Page, service: str, end: str, shown: str) -> None:
    answer_with(page, event("so far", b"so far"), end=end)
    open_page(page, service, prompt="The")
    run(page)
    expect(page.locator(".pane [role=alert]")).to_contain_text(shown)
    expect(page.locator(".figures")).to_contain_text("failed")
    assert text_of(page) == "so far"


@needs_chromium
def test_text_of_model_and_prompt_is_never_read_as_markup(page: Page, service: str) -> None:
    alternatives = {"token_id": 9, "text": MARKUP, "bytes": list(MARKUP.encode()), "logprob": -1.0}
    said = event(MARKUP, MARKUP.encode(), reason="stop")
    said["choices"][0]["logprobs"][0]["top"] = [alternatives]
    answer_with(page, said)
    open_page(page, service, prompt=MARKUP)
    run(page)
    page.locator(".token").hover()
    assert text_of(page) == MARKUP
    expect(page.locator(".given")).to_have_text(MARKUP)
    expect(page.get_by_role("tooltip")).to_contain_text("<img")
    assert page.locator(":is(.output, .card) :is(img, script)").count() == 0
    assert page.title() == "GPT Foundry playground"


@needs_chromium
def test_tokens_match_the_text_despite_split_characters_and_held_back_stops(page: Page, service: str) -> None:
    smile = "😀".encode()
    answer_with(
        page,
        event("a", b"a"),
        event("", smile[:2]),  # half a character: no text yet
        event("😀", smile[2:]),
        event("", b" ST"),  # might begin a stop string
        event(" STe", b"e"),  # it did not
        event("", b"\xe2"),  # no UTF-8, complete only when the next byte is known
        event("\ufffdb", b"bSTOP", reason="stop"),  # the stop string is part of a token, and is not shown
    )
    open_page(page, service, prompt="The")
    run(page)
    assert text_of(page) == "a😀 STe\ufffdb"
    assert page.locator(".token").all_text_contents() == ["a", "😀", " ST", "e", "\ufffdb"]
    page.locator(".token").nth(1).hover()
    expect(page.locator(".card ol")).to_have_count(2)  # one for each token that the character is made of
    expect(page.locator(".card .name").first).to_have_text(r"\xf0\x9f")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_systems_theme_until_changed(new_page: Callable[..., Page], service: str, scheme: str) -> None:
    page = new_page(color_scheme=scheme)
    open_page(page, service)
    assert is_dark(page) == (scheme == "dark")
    theme = page.get_by_role("button", name="Theme")
    for name in ("light", "dark"):
        theme.click()
        expect(theme).to_have_accessible_name(f"Theme: {name}")
        assert is_dark(page) == (name == "dark")
    page.reload()
    assert is_dark(page)


@needs_chromium
def test_page_fits_a_phone_and_tokens_can_be_tapped(new_page: Callable[..., Page], service: str) -> None:
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    open_page(page, service, prompt="The" + "w" * 60, max_new_tokens=60, compare="other", ignore_eos="true")
    run(page)
    page.get_by_text("Settings", exact=True).tap()
    page.get_by_text("Where this model comes from").first.tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    readable(page).nth(5).tap()
    card = page.get_by_role("tooltip")
    expect(card).to_be_visible()
    box = card.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    page.get_by_role("heading", level=1).tap()
    expect(card).to_be_hidden()


@needs_chromium
def test_a_link_carries_prompt_models_and_settings(page: Page, service: str) -> None:
    open_page(page, service)
    page.get_by_label("Prompt").fill("Ä & b = #1")
    page.get_by_role("spinbutton", name="Top-k").fill("40")
    page.get_by_label("Stop strings").fill("\\n\nEND")
    page.get_by_label("Go on after the end of text").check()
    page.get_by_label("Compare two").check()
    page.get_by_label("Second model").select_option("tiny")
    expect(page).to_have_url(re.compile("compare=tiny"))
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    expect(page.get_by_label("Second model")).to_have_value("tiny")
    expect(page.get_by_label("Prompt")).to_have_value("Ä & b = #1")
    expect(page.get_by_role("spinbutton", name="Top-k")).to_have_value("40")
    expect(page.get_by_label("Go on after the end of text")).to_be_checked()
    with page.expect_request("**/generate") as sent:
        page.get_by_role("button", name="Run").click()
    assert sent.value.post_data_json["stop"] == ["\n", "END"]


@needs_chromium
def test_every_sampling_parameter_has_a_control_whose_limits_the_service_accepts(page: Page, service: str) -> None:
    open_page(page, service, prompt="The")
    others = {"prompt", "model", "n", "echo", "stream", "stop_token_ids", "add_special_tokens"}
    fields = set(GenerateRequest.model_fields) - others
    controls = page.locator("#controls [name]")
    assert set(controls.evaluate_all("all => all.map((one) => one.name)")) == fields
    for name, low, high in controls.evaluate_all(
        "all => all.filter((one) => one.type === 'number').map((one) => [one.name, one.min, one.max])"
    ):
        for value in (low, high):
            GenerateRequest.model_validate({"prompt": "The", name: json.loads(value)})
        expect(page.locator(f"#help-{name}")).not_to_be_empty()


@needs_chromium
def test_a_seed_can_be_kept_and_a_text_continued(page: Page, service: str) -> None:
    open_page(page, service, prompt="The", max_new_tokens=8, ignore_eos="true")
    run(page)
    seed, text = page.locator(".figure button").inner_text(), text_of(page)
    page.locator(".figure button").click()
    expect(page.get_by_label("Seed")).to_have_value(seed)
    page.get_by_role("button", name="Run").click()
    ended(page)
    assert text_of(page) == text
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_label("Prompt")).to_have_value("The" + text.replace("\r\n", "\n").replace("\r", "\n"))
    expect(page.locator(".given")).to_have_text("The" + text)


@needs_chromium
def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab_and_out_of_the_link(
    page: Page, models: tuple[str, ...]
) -> None:
    with running(ServeSettings(models=models, api_keys=(KEY,), log_level="warning")) as locked:
        _unlock_and_run(page, locked.url)


def _unlock_and_run(page: Page, url: str) -> None:
    page.goto(f"{url}/#seed=3&ignore_eos=true")  # so that there is text
    key = page.get_by_label("API key")
    expect(key).to_be_visible()
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#problem")).to_contain_text("unknown")
    key.fill(KEY)
    key.press("Enter")
    expect(page.locator(".model option").first).to_be_attached()
    expect(key).to_be_hidden()
    page.get_by_label("Prompt").fill("The")
    run(page)
    assert text_of(page)
    assert KEY not in page.url
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    page.reload()
    expect(page.locator(".model option").first).to_be_attached()
    expect(key).to_be_hidden()


def readable(page: Page) -> Locator:
    """Tokens that have a shape on the page: random bytes are line breaks and control characters too."""
    return page.locator(".token", has_text=re.compile("[A-Za-z0-9]"))


def background(token: Locator) -> str:
    return token.evaluate("one => getComputedStyle(one).backgroundColor")


def is_dark(page: Page) -> bool:
    """Whether the page's background is darker than its text."""
    page_colour, ink = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }"
    )
    return sum(map(float, re.findall(r"[\d.]+", page_colour))) < sum(map(float, re.findall(r"[\d.]+", ink)))
