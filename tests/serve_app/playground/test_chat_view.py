"""The playground's chat in a real Chromium against the real service: what a user sees and does."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from gptcore.package import Package
from serve_app.http.chat_schemas import ChatRequest
from serve_app.settings import ALL, ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.playground.conftest import needs_chromium
from tests.serve_app.running import Running, running
from tests.waiting import eventually

pytestmark = needs_chromium
TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LONG, SHORT = 8000, 64
"""Context lengths: time enough for a user to press Stop, and too short for three turns."""
FIXED: dict[str, Any] = {"seed": 7, "max_completion_tokens": 12, "ignore_eos": "true"}
HARMFUL = """<img src=x onerror="document.title='broken'"> <script>document.title='broken'</script>
[press](javascript:document.title='broken') [page](data:text/html,x) ![seen](http://127.0.0.1:9/track.png)"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of random weights with a chat template, by name."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = write_tokenizer("smollm2", root / "tokenizer")
    made = {
        name: publish(tokenizer, root / name, 512, "llama", context)
        for name, context in (("talker", LONG), ("short", SHORT))
    }
    for folder in made.values():
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def running_service(folders: dict[str, Path], package: Package) -> Iterator[Running]:
    models = (*(f"{name}={folder}" for name, folder in folders.items()), f"tiny={package.path}")
    with running(ServeSettings(models=models, eager=(ALL,), max_new_tokens=LONG, log_level="warning")) as service:
        eventually(lambda: all(model.state == "ready" for model in service.models.describe()), "all are loaded")
        yield service


@pytest.fixture
def service(running_service: Running) -> str:
    """The address of a service with two models that chat and one that only continues text."""
    return running_service.url


def message(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def open_chat(page: Page, url: str, **setup: object) -> None:
    page.goto("about:blank")
    page.goto(f"{url}/#{urlencode(setup)}")
    expect(message(page)).to_be_visible()


def ask(page: Page, question: str, turns: int = 1) -> None:
    """Sends a message, and waits until the conversation has so many turns and no answer arrives any more."""
    message(page).fill(question)
    message(page).press("Enter")
    answered(page, turns)


def answered(page: Page, turns: int) -> None:
    expect(page.locator(".turn")).to_have_count(turns)
    expect(page.locator(".arriving")).to_have_count(0)


def kept(page: Page) -> list[dict[str, Any]]:
    """The conversations that the browser keeps."""
    return json.loads(page.evaluate("localStorage.getItem('conversations') ?? '[]'"))


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    """An event of a streamed answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return {"model": "talker", "system_fingerprint": "talker/1", "choices": [choice], "truncated": {"messages": 0}}


def answer_with(page: Page, *events: dict[str, Any], end: str = "data: [DONE]\n\n") -> list[dict[str, Any]]:
    """Makes the next answers these events. Returns the list to which the bodies of the requests are added."""
    asked: list[dict[str, Any]] = []
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end

    def fulfill(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfill)
    return asked


def contents(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


def test_the_model_decides_between_chat_and_text_until_the_user_does(page: Page, service: str) -> None:
    open_chat(page, service)
    expect(page.get_by_label("Prompt", exact=True)).to_be_hidden()
    page.get_by_role("combobox", name="Model").select_option("tiny")
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(message(page)).to_be_hidden()
    expect(page.get_by_role("group", name="View")).to_be_hidden()
    page.get_by_role("combobox", name="Model").select_option("short")
    expect(message(page)).to_be_visible()
    page.get_by_role("button", name="Text", exact=True).click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile("view=text"))
    page.reload()
    expect(page.get_by_role("group", name="View")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()


def test_an_answer_is_the_apis_and_is_kept_after_a_reload(page: Page, service: str) -> None:
    open_chat(page, service, **FIXED)
    ask(page, "The cat?")
    body = {"model": "talker", "messages": [{"role": "user", "content": "The cat?"}]}
    reply = httpx2.post(f"{service}/v1/chat/completions", json=body | FIXED | {"ignore_eos": True}).json()
    assert kept(page)[0]["turns"][0]["answers"][0]["text"] == reply["choices"][0]["message"]["content"]
    about = page.locator(".about")
    expect(about).to_have_text(f"talker version {reply['system_fingerprint'].split('/')[1]}seed 7length reached")
    shown = page.locator(".answer .body").text_content()
    assert shown
    page.reload()
    expect(page.locator(".asked")).to_have_text("The cat?")
    expect(page.locator(".answer .body")).to_have_text(shown, use_inner_text=False)
    expect(about).to_contain_text("seed 7")


def test_text_appears_as_it_arrives_and_escape_stops_it(page: Page, running_service: Running) -> None:
    open_chat(page, running_service.url, ignore_eos="true")
    message(page).fill("The")
    message(page).press("Shift+Enter")
    expect(message(page)).to_have_value("The\n")
    message(page).press("Enter")
    body = page.locator(".answer .body")
    expect(body).not_to_be_empty()
    expect(body).to_have_attribute("aria-busy", "true")
    expect(message(page)).to_be_focused()
    message(page).fill("And?")
    message(page).press("Enter")
    expect(message(page)).to_have_value("And?")  # it waits for the answer
    page.keyboard.press("Escape")
    answered(page, 1)
    expect(page.locator(".about")).to_contain_text("stopped")
    expect(body).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert kept(page)[0]["turns"][0]["answers"][0]["text"]
    eventually(lambda: running_service.stats.slots_used == 0, "the slot is free")


def test_an_answer_can_be_regenerated_and_a_message_edited_and_resent(page: Page, service: str) -> None:
    asked = answer_with(page, said("Yes."), said("", "stop"))
    open_chat(page, service)
    ask(page, "One?")
    ask(page, "Two?", turns=2)
    assert contents(asked[1]) == ["One?", "Yes.", "Two?"]
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)  # of the last answer
    page.get_by_role("button", name="Regenerate").click()
    answered(page, 2)
    assert contents(asked[2]) == contents(asked[1])
    assert asked[2]["seed"] != asked[1]["seed"]
    page.get_by_role("button", name="Edit message").first.click()
    edited = page.get_by_role("textbox", name="Edit your message")
    expect(edited).to_be_focused()
    edited.fill("Three?")
    edited.press("Enter")
    answered(page, 1)
    assert contents(asked[3]) == ["Three?"]
    assert asked[3]["truncate"] == "oldest"
    assert [turn["question"] for turn in kept(page)[0]["turns"]] == ["Three?"]


def test_nothing_that_a_model_or_a_user_writes_becomes_markup(page: Page, service: str) -> None:
    answer_with(page, said(HARMFUL, "stop"))
    open_chat(page, service)
    ask(page, HARMFUL)
    body = page.locator(".answer .body")
    for text in ("<img src=x", "<script>", "[press](javascript:document", "[page](data:text/html,x)"):
        expect(body).to_contain_text(text)
    expect(page.locator(".asked")).to_have_text(HARMFUL)
    assert page.locator("main :is(img, script, iframe)").count() == 0
    assert body.locator("a").evaluate_all("all => all.map((one) => [one.href, one.rel])") == [
        ["http://127.0.0.1:9/track.png", "noopener noreferrer"]  # an image is a link, and loads nothing
    ]
    assert page.title() == "GPT Foundry playground"


MARKDOWN = [
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("# A\n## **B**", "<h3>A</h3><h4><strong>B</strong></h4>"),
    ("```py\nif a < b:\n    *c*\n```", '<pre><code data-language="py">if a &lt; b:\n    *c*</code></pre>'),
    ("~~~\n```\n~~~\nend", "<pre><code>```</code></pre><p>end</p>"),
    ("```\nunfinished", "<pre><code>unfinished</code></pre>"),
    ("- b\n  2. c\n\nend", '<ul><li><p>b</p><ol start="2"><li><p>c</p></li></ol></li></ul><p>end</p>'),
    ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
    ("|a|b|\n|-|:-:|\n|1|*2*|", "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
     "<tbody><tr><td>1</td><td><em>2</em></td></tr></tbody></table>"),
    ("---", "<hr>"),
    ("*a* **b** ***c*** _d_ `e*f*`", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> "
     "<code>e*f*</code></p>"),
    ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
    ("2 * 3 * 4, snake_case_name, **open, `open, \\*", "<p>2 * 3 * 4, snake_case_name, **open, `open, *</p>"),
    ("[a](b) [c](ftp://d) &amp; <b>", "<p>[a](b) [c](ftp://d) &amp;amp; &lt;b&gt;</p>"),
    (">" * 99 + " a", "<blockquote>" * 8 + "<p>" + "&gt;" * 91 + " a</p>" + "</blockquote>" * 8),
]  # fmt: skip


def test_markdown_becomes_elements_and_unfinished_marks_stay_text(page: Page, service: str) -> None:
    open_chat(page, service)
    shown = page.evaluate(
        """async (texts) => {
          const { markdown } = await import("/playground/markdown.js");
          return texts.map((text) => {
            const box = document.createElement("div");
            box.append(markdown(text));
            for (const element of box.querySelectorAll("[tabindex]")) element.removeAttribute("tabindex");
            for (const element of box.querySelectorAll("div.table")) element.replaceWith(...element.childNodes);
            return box.innerHTML;
          });
        }""",
        [text for text, _ in MARKDOWN],
    )
    assert shown == [html for _, html in MARKDOWN]


def test_links_code_and_answers_can_be_used(new_page: Callable[..., Page], service: str) -> None:
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    text = "See https://example.org/a_b.\n```\nx = 1\n```"
    answer_with(page, said(text, "stop"))
    open_chat(page, service)
    ask(page, "How?")
    link = page.locator(".answer .body").get_by_role("link")
    expect(link).to_have_attribute("href", "https://example.org/a_b")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    for name, copied in (("Copy code", "x = 1"), ("Copy answer", text), ("Copy message", "How?")):
        page.get_by_role("button", name=name).click()
        eventually(lambda text=copied: page.evaluate("navigator.clipboard.readText()") == text, f"{name} copies it")
    expect(page.locator("#said")).to_have_text("Copied.")


def test_several_conversations_are_kept_and_can_be_deleted(page: Page, service: str) -> None:
    answer_with(page, said("Yes.", "stop"))
    open_chat(page, service)
    ask(page, "First?")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(message(page)).to_be_focused()
    ask(page, "Second?")
    assert [one["turns"][0]["question"] for one in kept(page)] == ["Second?", "First?"]
    page.get_by_role("button", name="First?", exact=True).click()
    expect(page.locator(".asked")).to_have_text("First?")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete “First?”").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert [one["turns"][0]["question"] for one in kept(page)] == ["Second?"]


def test_the_history_is_bounded_and_survives_what_it_cannot_read(page: Page, service: str) -> None:
    open_chat(page, service)
    counts = page.evaluate(
        """async () => {
          const { keep, stored } = await import("/playground/store.js");
          const turn = (length) => ({ question: "x".repeat(length), answers: [{ text: "" }] });
          const one = (id, length) => ({ id: `${id}`, system: "", turns: [turn(length)] });
          for (let id = 0; id < 105; id += 1) keep(one(id, 9));
          const many = stored().length;
          const latest = stored()[0].id;
          for (let id = 0; id < 5; id += 1) keep(one(`big ${id}`, 600_000));
          const large = stored().map(({ id }) => id);
          const tooLarge = keep(one("whole", 9_000_000));
          const left = stored().length;
          localStorage.setItem("conversations", '[1, {"id": "a"}, null]');
          const spoiled = stored().length;
          localStorage.setItem("conversations", "{");
          return { many, latest, large, tooLarge, left, spoiled, unread: stored().length };
        }"""
    )
    assert counts == {
        "many": 100,
        "latest": "104",
        "large": ["big 4", "big 3", "big 2"],
        "tooLarge": False,
        "left": 3,
        "spoiled": 0,
        "unread": 0,
    }


def test_the_page_says_how_many_messages_were_left_out(page: Page, service: str) -> None:
    open_chat(page, service, model="short", **FIXED)
    for turns in (1, 2, 3):
        ask(page, "The cat sat on the mat?", turns)
    expect(page.locator(".left-out").last).to_contain_text("oldest messages were left out")
    expect(page.locator(".left-out").first).to_be_hidden()


def test_a_system_prompt_is_sent_and_kept_with_its_conversation(page: Page, service: str) -> None:
    asked = answer_with(page, said("Yes.", "stop"))
    open_chat(page, service)
    page.get_by_text("System prompt", exact=True).click()
    page.get_by_role("textbox", name="System prompt").fill("Be kind.")
    ask(page, "One?")
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    page.reload()
    expect(page.get_by_role("textbox", name="System prompt")).to_have_value("Be kind.")


def test_a_service_with_its_own_system_prompt_takes_no_other(page: Page, folders: dict[str, Path]) -> None:
    settings = ServeSettings(models=(f"talker={folders['talker']}",), system_prompt="Be brief.", log_level="warning")
    with running(settings) as strict:
        assert httpx2.get(f"{strict.url}/models").json()["system_prompt"] is True
        open_chat(page, strict.url, **FIXED)
        page.get_by_text("System prompt", exact=True).click()
        expect(page.get_by_role("textbox", name="System prompt")).to_be_disabled()
        expect(page.get_by_text("This service sets the system prompt")).to_be_visible()
        ask(page, "The cat?")
        expect(page.locator(".answer .problem")).to_be_hidden()


@pytest.mark.parametrize(
    ("end", "shown"),
    [('data: {"error": {"message": "the engine failed"}}\n\n', "the engine failed"), ("", "The connection was lost")],
)
def test_an_interrupted_answer_stays_and_says_why(page: Page, service: str, end: str, shown: str) -> None:
    answer_with(page, said("so far"), end=end)
    open_chat(page, service)
    ask(page, "One?")
    expect(page.locator(".answer .problem")).to_contain_text(shown)
    expect(page.locator(".answer .body")).to_have_text("so far")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_a_refused_setting_is_marked_and_the_question_is_not_sent_again(page: Page, service: str) -> None:
    open_chat(page, service)
    page.get_by_text("Settings", exact=True).click()
    field = page.get_by_role("spinbutton", name="Temperature")
    field.fill("-3")
    ask(page, "One?")
    expect(page.locator(".answer .problem")).to_contain_text("temperature is -3")
    expect(field).to_have_attribute("aria-invalid", "true")
    field.fill("0")
    asked = answer_with(page, said("Yes.", "stop"))
    ask(page, "Two?", turns=2)
    assert contents(asked[0]) == ["Two?"]  # two questions in a row are refused by some templates


def test_the_chats_settings_are_the_routes_and_start_folded(page: Page, service: str) -> None:
    open_chat(page, service)
    controls = page.locator("#controls [name]")
    expect(controls.first).to_be_hidden()
    others = {"model", "messages", "n", "stream", "stream_options", "logprobs", "top_logprobs", "max_tokens", "user"}
    others |= {"stop_token_ids", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "truncate"}
    names = set(controls.evaluate_all("all => all.map((one) => one.name)"))
    assert names == set(ChatRequest.model_fields) - others


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_fits_a_phone(new_page: Callable[..., Page], service: str, scheme: str) -> None:
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    wide = f"{'w' * 90}\n```\n{'x' * 200}\n```\n|{'a|' * 30}\n|{'-|' * 30}\n"
    answer_with(page, said(wide, "stop"))
    open_chat(page, service)
    ask(page, "w" * 90)
    page.get_by_text("Conversations", exact=True).tap()
    page.get_by_text("System prompt", exact=True).tap()
    page.get_by_text("Settings", exact=True).tap()
    page.get_by_role("button", name="Edit message").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_an_example_can_be_asked(page: Page, service: str) -> None:
    asked = answer_with(page, said("12", "stop"))
    open_chat(page, service)
    page.get_by_role("button", name="What is 7 plus 5?").click()
    answered(page, 1)
    assert contents(asked[0]) == ["What is 7 plus 5?"]
    expect(page.locator(".talk .examples")).to_be_hidden()


def test_two_models_answer_one_conversation_side_by_side(page: Page, service: str) -> None:
    open_chat(page, service, **FIXED)
    ask(page, "The cat?")
    page.get_by_label("Compare with").select_option("short")
    with page.expect_request(lambda request: '"model":"short"' in (request.post_data or "")) as sent:
        ask(page, "Why?", turns=2)
    first = kept(page)[0]["turns"][0]["answers"][0]["text"]
    assert contents(sent.value.post_data_json) == ["The cat?", first, "Why?"]
    for answer, model in zip(page.locator(".turn").last.locator(".answer").all(), ("talker", "short"), strict=True):
        expect(answer.locator(".about")).to_contain_text(f"{model} version")
    left, right = (
        box for answer in page.locator(".turn").last.locator(".answer").all() if (box := answer.bounding_box())
    )
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)


@pytest.fixture
def voting(folders: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a service that keeps votes, and their folder."""
    settings = ServeSettings(models=(f"talker={folders['talker']}",), feedback=str(tmp_path), log_level="warning")
    with running(settings) as service:
        yield service.url, tmp_path


def votes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text("utf-8").splitlines()]


def test_a_good_answer_is_voted_for_with_its_conversation(page: Page, voting: tuple[str, Path]) -> None:
    url, folder = voting
    answer_with(page, said("Paris.", "stop") | {"id": "chatcmpl-7"})
    open_chat(page, url)
    ask(page, "Capital of France?")
    good = page.get_by_role("button", name="Good answer")
    good.click()
    expect(good).to_have_attribute("aria-pressed", "true")
    (vote,) = votes(folder)
    messages = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
    assert vote["messages"] == messages
    assert (vote["id"], vote["score"], vote["model"]) == ("chatcmpl-7", 1, "talker/1")
    page.reload()
    expect(good).to_have_attribute("aria-pressed", "true")


def test_a_bad_answer_may_get_a_better_one(page: Page, voting: tuple[str, Path]) -> None:
    url, folder = voting
    answer_with(page, said("Lyon.", "stop") | {"id": "chatcmpl-8"})
    open_chat(page, url)
    ask(page, "Capital of France?")
    ask(page, "Really?", turns=2)
    page.get_by_role("button", name="Bad answer").first.press("Enter")
    better = page.get_by_role("textbox", name="A better answer")
    expect(better).to_be_focused()
    (vote,) = votes(folder)
    assert (vote["score"], vote["messages"][-1]) == (-1, {"role": "assistant", "content": "Lyon.", "weight": 0})
    better.fill("Paris.")
    page.locator(".better:visible").get_by_role("button", name="Send").click()
    expect(better).to_be_hidden()
    expect(page.get_by_role("button", name="Bad answer").first).to_be_focused()
    page.get_by_role("button", name="Bad answer").first.click()
    expect(better).to_be_visible()
    (vote,) = votes(folder)
    asked, answer = vote["messages"]
    assert (asked["content"], answer, vote["answer"]) == (
        "Capital of France?",
        {"role": "assistant", "content": "Paris."},
        "Lyon.",
    )


def test_a_vote_that_was_not_kept_says_why(page: Page, voting: tuple[str, Path]) -> None:
    url, _ = voting
    answer_with(page, said("Paris.", "stop") | {"id": "chatcmpl-9", "system_fingerprint": "gone/1"})
    open_chat(page, url)
    ask(page, "Capital of France?")
    page.get_by_role("button", name="Good answer").click()
    expect(page.locator(".answer .voted")).to_contain_text("The vote was not kept: ")
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "false")


def test_a_service_that_keeps_no_votes_offers_none(page: Page, service: str) -> None:
    answer_with(page, said("Paris.", "stop") | {"id": "chatcmpl-9"})
    open_chat(page, service)
    ask(page, "Capital of France?")
    expect(page.get_by_role("button", name="Copy answer")).to_be_visible()
    expect(page.get_by_role("button", name="Good answer")).to_be_hidden()
