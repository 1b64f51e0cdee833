"""A terminal chat with the models of a running service.

    python -m serve_app.chat [--url http://127.0.0.1:8000] [--model NAME] [--temperature 0.9 ...]
    echo "Once upon a time" | python -m serve_app.chat

The models were trained to continue text, not to answer, and know no roles or turns. So the chat works like this:

- **A conversation is one text.** What you type is appended on a new line, and the model continues from there. Nothing
  else is sent: no "User:", no instructions that the model never saw in training. The screen shows exactly what the
  model reads, so nobody mistakes a continuation for an answer.
- **The text is kept by default**, and each line continues it; the service computes the known part only once (prefix
  cache). `/history off` makes each line an independent prompt, which is the default for piped input.
- **The text's beginning is cut off** when model and answer no longer have room for it, and the chat says so. It cuts
  more than it must, so that the cached beginning stays the same for several answers.
- **The model's text is not trusted.** Terminal control characters in it are replaced.

`client` speaks HTTP, `asking` retries until there is an answer, `conversation` keeps the text, `values` has the
sampling parameters, `commands` the slash commands, `terminal` keyboard and screen; `__main__` is the command line.
Nothing here imports Ray, MLflow, torch or FastAPI, so it starts quickly and runs on any client machine.
"""
