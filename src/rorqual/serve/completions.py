"""`POST /v1/completions`, `/completions` and `/beta/completions`: text in, text out, and FIM."""

from __future__ import annotations

from rorqual.engine import Request
from rorqual.serve.completion_job import check_lengths, completion_assembler, completion_params
from rorqual.serve.completions_assembler import CompletionAssembler
from rorqual.serve.fair_pool import Caller
from rorqual.serve.prompts import completion_prompts
from rorqual.serve.reply import AnswerResponse, collect
from rorqual.serve.sampling import choices
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.service import NOBODY, Service


async def prepare_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> tuple[list[Request], CompletionAssembler]:
    """ApiError for whatever is wrong with the request."""
    service.check_body(body)
    model = service.model
    num_chars = check_lengths(body, model)
    prompts = await service.aside(
        lambda: completion_prompts(body, model.tokenizer), "prompt", caller, num_chars
    )
    for prompt in prompts:
        model.check_prompt(prompt.ids, "prompt")
    params = completion_params(body, model)
    service.log_ignored(body.notes)
    compiled = await service.compile(params.grammar, caller, body.written("response_format"))
    each = choices(params, body.n or 1)
    requests = [
        Request(prompt.ids, param, caller.owner, caller.is_background, compiled)
        for prompt in prompts
        for param in each
    ]
    return requests, completion_assembler(body, model, prompts)


async def answer_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    requests, assembler = await prepare_completion(service, body, caller)
    return AnswerResponse(
        service, requests, assembler, is_stream=bool(body.stream), notes=body.notes
    )


async def collect_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> str:
    """The reply's JSON, for batches."""
    requests, assembler = await prepare_completion(service, body, caller)
    return await collect(service, requests, assembler)
