"""A chat in the terminal with the models of a running service.

    python -m serve_app.chat [--url http://127.0.0.1:8000] [--model NAME] [--temperature 0.9 ...]
    echo "Once upon a time" | python -m serve_app.chat

In come lines, out goes what the model makes of them, as it comes. What "chat" means here follows from what the models
are: they were trained to continue text, not to answer, and know no roles and no turns.

- **A conversation is one text that two write at.** What is typed is put behind it on a line of its own, and the model
  goes on from there. Nothing else is sent: no "User:", no instructions that the model never saw in training. So the
  screen shows what the model reads, and nobody takes a continuation for an answer.
- **It is remembered by default**, since one who reads on expects the next line to belong to the same text, and the
  service computes what it knows already only once (its prefix cache). `/history off` makes each line a prompt of its
  own; where input is piped that is the default, for the lines of a file are as a rule independent.
- **It is cut at its beginning** once model and answer no longer have room for it, and the chat says so. It is cut
  further than it must be, so that the text keeps its beginning, and the cache its use, for some answers.
- **The model's text is not trusted.** Characters that steer a terminal never reach it.

`client` speaks HTTP, `asking` gets an answer whatever comes between, `conversation` keeps the text, `values` knows the
sampling parameters, `commands` the slash commands, `terminal` keyboard and screen; `__main__` is the command line.
Nothing here imports Ray, MLflow, torch or FastAPI: it starts at once, and runs where only a service can be reached.
"""
