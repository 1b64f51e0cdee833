"""Text to token ids and back, in vLLM's form: `/tokenize`, `/detokenize` and `/tokenizer_info`.

Clients such as `lm-eval` use them to count tokens without the model's files. The ids are the same as in
`/v1/completions`, so the characters of a special token are ordinary text. The one exception is the end-of-text token's
spelling alone, `<|endoftext|>` for most, which becomes that token, since clients ask for its id this way.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from gptcore.errors import ConfigError
from serve_app.generation.order import LONG_TEXT, encode
from serve_app.generation.replies import to_json
from serve_app.http.reply_schemas import Detokenized, Tokenized, TokenizerInfo
from serve_app.http.schemas import DetokenizeRequest, TokenizeRequest
from serve_app.models.load import ServedModel
from serve_app.state import AppState


def router(state: AppState) -> APIRouter:
    """The three routes."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize", response_model=None, responses={200: {"model": Tokenized}}, summary="Text to token ids")
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        async with state.models.lease(body.model, request.state.request_id) as served:
            tokenizer = served.package.tokenizer
            if body.prompt == tokenizer.spelling(tokenizer.eot):
                ids: tuple[int, ...] = (tokenizer.eot,)
            else:
                ids = (*(tokenizer.bos if body.add_special_tokens else ()), *await encode(tokenizer, body.prompt))

            def reply() -> dict[str, Any]:
                spelled = [tokenizer.spelling(token) for token in ids] if body.return_token_strs else None
                length = served.engine.info.context_length
                return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": spelled}

            return await _answer(served, reply, len(ids))

    @routes.post(
        "/detokenize", response_model=None, responses={200: {"model": Detokenized}}, summary="Token ids to text"
    )
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        async with state.models.lease(body.model, request.state.request_id) as served:
            tokenizer = served.package.tokenizer
            if body.tokens and (largest := max(body.tokens)) >= tokenizer.vocab_size:
                most = tokenizer.vocab_size - 1
                raise ConfigError(f"tokens has the token id {largest}; this model's go from 0 to {most}", "tokens")
            return await _answer(served, lambda: {"prompt": tokenizer.decode(body.tokens)}, len(body.tokens))

    @routes.get("/tokenizer_info", response_model=None, responses={200: {"model": TokenizerInfo}})
    async def tokenizer_info(request: Request) -> Response:
        """The default model's tokenizer, in the form of `transformers`' tokenizer_config.json."""
        async with state.models.lease(None, request.state.request_id) as served:
            tokenizer = served.package.tokenizer
            begin, end = (tokenizer.spelling(token) for token in (tokenizer.encode_prompt("")[0], tokenizer.eot))
            info = TokenizerInfo(
                bos_token=begin,
                eos_token=end,
                model_max_length=served.engine.info.context_length,
                chat_template=served.chat_template.source if served.chats and served.chat_template else None,
            )
            return await _answer(served, info.model_dump, 1)

    return routes


async def _answer(served: ServedModel, reply: Callable[[], dict[str, Any]], size: int) -> Response:
    """`reply()` as JSON, encoded in a thread if it is long, so that the event loop can serve other streams."""

    def written() -> bytes:
        return to_json(reply()).encode()

    body = written() if size < LONG_TEXT else await asyncio.to_thread(written)
    return Response(body, media_type="application/json", headers={"x-model-version": served.name_version})
