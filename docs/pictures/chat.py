"""`docs/images/chat.png` and `docs/images/chat-phone.png`: a conversation with the chat demo's model.

    python -m docs.pictures.chat

The first is the page of a desktop, the second that of a phone in the dark.
"""

from playwright.sync_api import Browser, Page, expect

from docs.pictures import environment, keep, trained_run
from docs.pictures.playground import service
from tests.serve_app.playground.browser import chromium

QUESTIONS = ("Hello! My name is Olga.", "Spell the word kitten.", "What is my name?")
NEW, OLD = "Kate has a red kite. What does Kate have?", "Sort 7 2 5."


def ask(page: Page, url: str, questions: tuple[str, ...]) -> None:
    page.goto(f"{url}/#temperature=0")
    message = page.get_by_role("textbox", name="Message", exact=True)
    for number, question in enumerate(questions, 1):
        message.fill(question)
        message.press("Enter")
        expect(page.locator(".turn")).to_have_count(number)
        expect(page.locator(".arriving")).to_have_count(0)


def desktop(browser: Browser, url: str) -> bytes:
    """A PNG of the page after a conversation, with two earlier ones in the list."""
    page = browser.new_page(viewport={"width": 1280, "height": 816}, device_scale_factor=2, reduced_motion="reduce")
    for earlier in (OLD, NEW):
        ask(page, url, (earlier,))
        page.get_by_role("button", name="New conversation").click()
    ask(page, url, QUESTIONS)
    page.get_by_role("button", name="Good answer").last.click()
    return page.screenshot()


def phone(browser: Browser, url: str) -> bytes:
    context = browser.new_context(
        viewport={"width": 390, "height": 780},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
        device_scale_factor=2,
        reduced_motion="reduce",
    )
    page = context.new_page()
    ask(page, url, QUESTIONS[:2])
    return page.screenshot()


def main() -> None:
    trained_run("demo-chat", "train_job/demo.py", "chat")
    votes = f"{environment()['GPT_FOUNDRY_HOME']}/votes"
    with service(model="models:/gpt-chat@champion", feedback=votes) as url, chromium() as browser:
        keep(desktop(browser, url), "chat")
        keep(phone(browser, url), "chat-phone")


if __name__ == "__main__":
    main()
