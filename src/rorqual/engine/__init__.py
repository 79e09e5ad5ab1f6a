"""The engine: requests in, answers out, over one paged cache of latents."""

from rorqual.engine.answer import Answer
from rorqual.engine.async_engine import FREE_PLACES_FACTOR, AnswerStream, AsyncEngine
from rorqual.engine.conversation import Conversation
from rorqual.engine.engine import Engine
from rorqual.engine.grammar import CompiledGrammar, Grammar
from rorqual.engine.logprobs import TokenLogprob
from rorqual.engine.offline import Stream
from rorqual.engine.options import EngineOptions
from rorqual.engine.params import MAX_SEED, SamplingParams
from rorqual.engine.request import FinishReason, Output, Piece, Request, Usage, check_prompt
from rorqual.engine.stats import EngineStats
from rorqual.errors import AnswerClosed, ClientOverloaded, EngineFailed, EngineOverloaded

__all__ = [
    "FREE_PLACES_FACTOR",
    "MAX_SEED",
    "Answer",
    "AnswerClosed",
    "AnswerStream",
    "AsyncEngine",
    "ClientOverloaded",
    "CompiledGrammar",
    "Conversation",
    "Engine",
    "EngineFailed",
    "EngineOptions",
    "EngineOverloaded",
    "EngineStats",
    "FinishReason",
    "Grammar",
    "Output",
    "Piece",
    "Request",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
    "Usage",
    "check_prompt",
]
