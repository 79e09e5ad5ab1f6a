"""Grammars, choices and batch lines of several clients through the real engine at once.

Oracle: the grammar's own list of answers, one compile, and the engine's free blocks.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from real import make_engine, serve_engine

from patience import HANG_SECONDS
from rorqual.engine import CompiledGrammar, Grammar
from rorqual.serve.chat import collect_chat
from rorqual.serve.errors import ApiError
from rorqual.serve.fair_pool import Caller
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytest.importorskip("llguidance")
pytestmark = pytest.mark.concurrency

WORDS = ["whale", "sea"]
CALLERS = (Caller(owner="a"), Caller(owner="b"), Caller(True, "a"), Caller(True, "batches"))


def body(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "Where does the whale swim?"}]
    return ChatRequest.model_validate({"messages": messages, "max_tokens": 20, **fields})


def test_grammars_choices_and_batch_lines_of_several_clients(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer, max_batch=2, speculate=1)
    made: list[Grammar] = []
    compile_one = engine.grammars._compile

    def noted(grammar: Grammar) -> Any:
        made.append(grammar)
        return compile_one(grammar)

    engine.grammars._compile = noted  # type: ignore[method-assign]
    choice = body(n=3, response_format={"type": "choice", "choices": WORDS})
    plain = body(n=2, ignore_eos=True)
    broken = body(response_format={"type": "regex", "regex": "("})

    async def test() -> None:
        face, model = serve_engine(engine)
        service = Service(face, model, ServerSettings())
        await face.start()
        try:
            jobs = [
                collect_chat(service, each, caller)
                for caller in CALLERS
                for each in (choice, plain)
            ]
            for caller in CALLERS:
                with pytest.raises(ApiError, match="unclosed group"):
                    await collect_chat(service, broken, caller)
            for reply in await asyncio.gather(*jobs):
                answers = json.loads(reply)["choices"]
                texts = {answer["message"]["content"] for answer in answers}
                assert len(answers) == 2 or texts <= set(WORDS)
            assert sorted(grammar.kind for grammar in made) == ["choice", "regex"]
            known = face.known_grammar(Grammar("choice", json.dumps(WORDS)))
            assert isinstance(known, CompiledGrammar)
        finally:
            async with asyncio.timeout(HANG_SECONDS):
                await face.close()
            service.close()

    asyncio.run(test())
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert engine.grammars.trial is None, "its helpers have ended"
