"""What an answer may be held to, and the fields of all servers that ask for it.

Whatever a client calls it, it becomes `response_format`; errors name what the client wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    field_validator,
    model_validator,
)

from rorqual.serve.field_row import STRUCTURED
from rorqual.serve.gbnf import as_lark
from rorqual.serve.json_values import is_suspect, unrepeatable
from rorqual.serve.schemas_common import (
    INVALID_GRAMMAR,
    JsonObject,
    SamplingFields,
    Strict,
    mismatch,
)

SCHEMA = "response_format.json_schema.schema"
MAX_SCHEMA_CHARS = 262_144
"""Of a schema in a text: values inside of texts are not counted before a body is parsed."""


def _read_schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA_CHARS:
        raise ValueError(f"has {len(value)} characters; at most {MAX_SCHEMA_CHARS} are read")
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is neither a schema nor a text that holds one as JSON") from None
    if is_suspect(value.encode(errors="replace")) and (found := unrepeatable(schema)) is not None:
        raise ValueError(": ".join(found).encode(errors="backslashreplace").decode())
    return schema


Regex = Annotated[str, Field(min_length=1, max_length=10_000)]
Choices = Annotated[list[str], Field(min_length=1, max_length=1000)]
GrammarText = Annotated[str, Field(min_length=1, max_length=100_000)]
Schema = Annotated[JsonObject, BeforeValidator(_read_schema)]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]
    whitespace: bool | None = Field(default=None, description="Extension: JSON may be laid out.")


class NamedSchema(Strict):
    name: str | None = None
    description: str | None = Field(default=None, description="Accepted, without effect.")
    json_schema: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always enforced.")


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema
    whitespace: bool | None = Field(default=None, description="Extension: JSON may be laid out.")


class RegexFormat(Strict):
    """Extension: the whole answer matches a regular expression."""

    type: Literal["regex"]
    regex: Regex


class ChoiceFormat(Strict):
    """Extension: the answer is one of these texts."""

    type: Literal["choice"]
    choices: Choices


class GrammarFormat(Strict):
    """Extension: a context-free grammar in Lark's notation, or in GBNF."""

    type: Literal["grammar"]
    grammar: GrammarText


def _schema_beside(value: Any) -> Any:
    """llama.cpp has the schema beside the type."""
    is_json = isinstance(value, dict) and value.get("type") in ("json_object", "json_schema")
    if not is_json or value.get("schema") is None or value.get("json_schema") is not None:
        return value
    rest = {key: item for key, item in value.items() if key != "schema"}
    return rest | {"type": "json_schema", "json_schema": {"schema": value["schema"]}}


Form = JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat
ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat,
    Discriminator("type"),
    BeforeValidator(_schema_beside),
]


class StructuredOutputs(Strict):
    """vLLM's way to ask for a form: one of its members."""

    PLACE: ClassVar[str] = STRUCTURED

    json_schema: Schema | None = Field(default=None, alias="json")
    regex: Regex | None = None
    choice: Choices | None = None
    choices: Choices | None = Field(default=None, description="As `choice`.")
    grammar: GrammarText | None = None
    json_object: bool | None = None


class FormFields(SamplingFields):
    """The fields of the answer's form: `response_format`, and what other servers call it."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    json_schema: Schema | None = Field(default=None, description="As `guided_json`.")
    regex: Regex | None = Field(default=None, description="As `guided_regex`.")
    ebnf: GrammarText | None = Field(default=None, description="As `guided_grammar`.")
    grammar: GrammarText | None = Field(default=None, description="As `guided_grammar`.")

    @field_validator("grammar", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _is_one_form(self) -> FormFields:
        forms = list(self._forms())
        if not forms:
            return self
        place, form = forms[0]
        for other, second in forms[1:]:
            if _asked(second) != _asked(form):
                message = f"{place} and {other} ask for different forms: give one of them"
                raise mismatch(other, message)
        if isinstance(form, GrammarFormat):
            form = _in_lark(form, place)
        self.response_format = form
        if place != "response_format":
            self.note_written("response_format", place)
            self.note_written(SCHEMA, place)
        return self

    def _forms(self) -> Iterator[tuple[str, Form]]:
        """What is asked for, by the place that asks."""
        given = self.response_format
        if given is not None and not isinstance(given, TextFormat):
            yield "response_format", given
        for name in ("guided_json", "json_schema"):
            yield from _form(name, "json_schema", getattr(self, name))
        for name in ("guided_regex", "regex"):
            yield from _form(name, "regex", getattr(self, name))
        yield from _form("guided_choice", "choice", self.guided_choice)
        for name in ("guided_grammar", "ebnf", "grammar"):
            yield from _form(name, "grammar", getattr(self, name))
        if (wanted := self.structured_outputs) is not None:
            place = "structured_outputs"
            yield from _form(f"{place}.json", "json_schema", wanted.json_schema)
            yield from _form(f"{place}.regex", "regex", wanted.regex)
            yield from _form(f"{place}.choice", "choice", wanted.choice)
            yield from _form(f"{place}.choices", "choice", wanted.choices)
            yield from _form(f"{place}.grammar", "grammar", wanted.grammar)
            yield from _form(f"{place}.json_object", "json_object", wanted.json_object or None)

    @property
    def schema_place(self) -> str:
        """Where the client has the schema that the answer is to follow."""
        return self.written(SCHEMA)


def _form(place: str, kind: str, value: Any) -> Iterator[tuple[str, Form]]:
    """As checked before; nothing of what is not given."""
    if value is None:
        return
    if kind == "json_schema":
        schema = NamedSchema.model_construct(json_schema=value)
        yield place, JsonSchemaFormat.model_construct(type=kind, json_schema=schema)
    elif kind == "regex":
        yield place, RegexFormat.model_construct(type=kind, regex=value)
    elif kind == "choice":
        yield place, ChoiceFormat.model_construct(type=kind, choices=value)
    elif kind == "grammar":
        yield place, GrammarFormat.model_construct(type=kind, grammar=value)
    else:
        yield place, JsonObjectFormat(type="json_object")


def _in_lark(form: GrammarFormat, place: str) -> GrammarFormat:
    """Once all fields are known to ask for it: it takes time that grows with the text."""
    try:
        return form.model_copy(update={"grammar": as_lark(form.grammar)})
    except ValueError as problem:
        raise mismatch(place, f"{place}: {problem}", INVALID_GRAMMAR) from None


def _asked(form: Form) -> Any:
    """The form itself, without what is said of it."""
    if isinstance(form, JsonSchemaFormat):
        return form.type, form.json_schema.json_schema
    return form.model_dump(exclude={"whitespace"})
