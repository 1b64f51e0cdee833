"""No password is shown, whatever characters it has, and other text is unchanged."""

import pytest

from gptcore.redact import without_password

PASSWORDS = [
    "secret",
    "pa/ss",
    "p@ss",
    "s@cr/et",
    "pa:ss",
    "p#a?s",
    "12/34",
    "pa ss",
    "8080x",
    "%2F@",
    "ü/€",
    "a" * 999,
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    ("scheme", "rest"),
    [
        ("http", "host"),
        ("https", "mlflow.example:5000/x"),
        ("HTTPS", "[::1]:5000"),
        ("postgresql+psycopg2", "host/db"),
        ("s3", "bucket/folder"),
    ],
)
def test_a_password_is_hidden_whatever_characters_it_has(password: str, scheme: str, rest: str) -> None:
    assert without_password(f"{scheme}://user:{password}@{rest}") == f"{scheme}://{rest}"
    said = f"API request to {scheme}://user:{password}@{rest} failed"
    assert without_password(said) == f"API request to {scheme}://{rest} failed"


@pytest.mark.parametrize("name", ["password", "token", "X-Amz-Signature", "sig", "api_key"])
def test_a_password_in_a_urls_parameters_is_hidden(name: str) -> None:
    shown = without_password(f"postgresql://host/db?user=me&{name}=se/cr@et&timeout=5")
    assert "cr@et" not in shown
    assert "se/" not in shown


def test_a_user_without_a_password_is_hidden_because_it_may_be_a_key() -> None:
    assert without_password("https://ghp_1234@host/x") == "https://host/x"


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000",
        "http://host:5000/a and mail me",
        "http://[::1]:5000/x",
        "models:/gpt@champion",
        "sqlite:////home/a@b/mlflow.db",
        "file:///home/a@b/mlruns",
        "me@example.org",
        "http://host/db?timeout=5&monkey_business=1",
    ],
)
def test_a_url_without_a_user_is_unchanged(text: str) -> None:
    assert without_password(text) == text
