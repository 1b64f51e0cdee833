"""A terminal chat with the models of a running service.

    python -m serve_app.chat [--url http://127.0.0.1:8000] [--model NAME] [--temperature 0.9 ...]
    echo "Once upon a time" | python -m serve_app.chat

It asks the service what a model can do. A model with a chat template answers the conversation. `--system` tells it how.
When there is no room for the whole conversation, the service leaves out the oldest turns, and the chat says so. Any
other model was trained to continue text, and knows no roles or turns. With such a model the chat works like this:

- **A conversation is one text.** What you type is appended on a new line, and the model continues from there. Nothing
  else is sent: no "User:", no instructions that the model never saw in training. The screen shows exactly what the
  model reads, so nobody mistakes a continuation for an answer.
- **The text is kept by default**, and each line continues it; the service computes the known part only once (prefix
  cache). `/history off` makes each line an independent prompt, which is the default for piped input.
- **The text's beginning is cut off** when model and answer no longer have room for it, and the chat says so. It cuts
  more than it must, so that the cached beginning stays the same for several answers.

**The model's text is not trusted.** Terminal control characters in it are replaced.

`client` speaks HTTP, `asking` retries until there is an answer, `conversation` keeps the turns, `session` sends them,
`values` has the sampling parameters, `commands` the slash commands, `saving` writes files, `terminal` has keyboard and
screen; `__main__` is the command line. Nothing here imports Ray, MLflow, torch or FastAPI, so it starts quickly and
runs on any client machine.
"""
