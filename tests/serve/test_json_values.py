"""Numbers and texts that JSON does not have are refused on every way in. Oracle: Python reads each,
and what it makes of them is no JSON that a reply could have.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from batch_stage import CHAT, Stages

from rorqual.serve.errors import ApiError
from rorqual.serve.offline import read_body
from rorqual.serve.schemas_batches import BatchRequest
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.store import NewFile

NUMBERS = ["NaN", "-Infinity", "1e999", "1" * 400 + ".0"]
TEXTS = ['"\\ud800"', '"a \\udfff"', '{"\\udc00": {}}']
QUESTION = '{"messages": [{"role": "user", "content": "hi"}], "metadata": {"x": [VALUE]}}'


@pytest.mark.parametrize("value", [*NUMBERS, *TEXTS])
def test_a_body_without_a_server(value: str) -> None:
    fields = json.loads(QUESTION.replace("VALUE", value))
    with pytest.raises(ApiError, match=r"^metadata\.x\[0\]") as caught:
        read_body(CHAT, fields)
    assert caught.value.status == 422


@pytest.mark.parametrize("value", NUMBERS)
def test_a_line_of_a_batch(stages: Stages, value: str) -> None:
    """What is wrong with its body is its answer. (Half a pair makes it no line at all.)"""

    async def run() -> Any:
        stage = stages(1)
        body = QUESTION.replace("VALUE", value)
        line = f'{{"custom_id": "a", "method": "POST", "url": "{CHAT}", "body": {body}}}'.encode()
        file = await stage.files.add([line], len(line), NewFile(name="in.jsonl", owner="me"))
        request = BatchRequest(input_file_id=file.id, endpoint=CHAT)
        reply = await stage.ended((await stage.batches.create(request, "me")).id)
        assert (reply.status, reply.request_counts.failed) == ("completed", 1)
        [record] = stage.records(reply.error_file_id)
        return record["response"]

    response = asyncio.run(run())
    assert response["status_code"] == 422
    assert response["body"]["error"]["param"] == "metadata.x[0]"
    assert "is no finite number" in response["body"]["error"]["message"]


@pytest.mark.parametrize("value", [*NUMBERS, *TEXTS])
def test_a_schema_in_a_text(value: str) -> None:
    text = f'{{"type": "object", "properties": {{"a": {{"const": {value}}}}}}}'
    fields = {"messages": [{"role": "user", "content": "hi"}], "guided_json": text}
    with pytest.raises(ValueError, match=r"properties\.a\.const.*(finite|surrogate)"):
        ChatRequest.model_validate(fields)
    fields["guided_json"] = text.replace(value, "1")
    assert ChatRequest.model_validate(fields).response_format is not None
