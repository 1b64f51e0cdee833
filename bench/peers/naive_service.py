"""A simple service for comparison: FastAPI, transformers' generate in a thread, its streamer, a lock.

`python -m bench.peers.naive_service PACKAGE --port 8001 --dtype bfloat16`. It answers one request at a time,
because threads that generate at the same time only compete for the cores. `POST /generate` has the parts of our
service's interface that `bench.serve` uses.
"""

import argparse
import json
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel


class Body(BaseModel):
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 1.0
    ignore_eos: bool = False
    stream: bool = True


def create_app(package: str, dtype: str) -> FastAPI:
    """The app around one model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(package)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(package, dtype=getattr(torch, dtype)).eval()
    app, lock = FastAPI(), threading.Lock()

    def events(body: Body) -> Iterator[str]:
        inputs = tokenizer(body.prompt, return_tensors="pt")
        settings: dict[str, Any] = dict(max_new_tokens=body.max_new_tokens, do_sample=body.temperature > 0)
        if body.temperature > 0:
            settings["temperature"] = body.temperature
        if body.ignore_eos:
            settings["eos_token_id"] = []
        streamer: Any = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
        output: list[torch.Tensor] = []
        with lock:
            worker = threading.Thread(
                target=lambda: output.extend(model.generate(**inputs, **settings, streamer=streamer))
            )
            worker.start()
            for text in streamer:
                yield f"data: {json.dumps({'text': text})}\n\n"
            worker.join()
        usage = {"completion_tokens": len(output[0]) - inputs["input_ids"].size(1)}
        yield f"data: {json.dumps({'usage': usage})}\n\ndata: [DONE]\n\n"

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/generate")
    def generate(body: Body) -> StreamingResponse:
        return StreamingResponse(events(body), media_type="text/event-stream")

    return app


def main() -> None:
    """Serves on loopback until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.naive_service")
    parser.add_argument("package")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    app = create_app(arguments.package, arguments.dtype)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
