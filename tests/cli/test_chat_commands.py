"""The chat's commands. Oracles: the turns that should be left, the server's own check of a field,
and files written out here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.cli.chat_commands import COMMANDS, Commands
from rorqual.cli.chat_files import HEADINGS, read_chat, title_of, write_chat
from rorqual.cli.chat_settings import CAN_BE_NONE, FIELDS, changed, listed
from rorqual.engine import Conversation, SamplingParams
from rorqual.errors import UsageError
from rorqual.serve.fields_honoured import HONOURED
from rorqual.serve.schemas_common import SamplingFields

NUM_IDS = 300
DEFAULTS = SamplingParams(temperature=0.3, max_tokens=20)


class Talk:
    """An engine of 100 places that answers with the number of its prompts so far."""

    max_positions = 100

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.tokenizer = SimpleNamespace(
            encode_chat=lambda messages: "|".join(m["content"] for m in messages),
            vocab_size=NUM_IDS,
        )

    def check_prompt(self, prompt: str) -> None:
        if len(prompt) >= self.max_positions:
            raise UsageError("does not fit")

    def stream(self, prompt: str, params: SamplingParams) -> Any:
        self.prompts.append(prompt)
        text = str(len(self.prompts))
        return type("S", (), {"text": text, "usage": None, "__iter__": lambda self: iter([text])})()


class Chat:
    def __init__(self, *, is_terminal: bool = True) -> None:
        self.said: list[str] = []
        self.engine = Talk()
        self.talk = Conversation(self.engine, DEFAULTS, "sys")  # type: ignore[arg-type]
        self.commands = Commands(self.talk, self.said.append, is_terminal=is_terminal)

    def type(self, text: str) -> str | None:
        """The answer; None for a command that is done."""
        pieces = self.commands.answer_to(text)
        return None if pieces is None else "".join(pieces)


def test_retry_and_undo() -> None:
    chat = Chat()
    assert chat.type("/retry") is chat.type("/undo") is None
    assert chat.said == ["There is nothing to answer anew.", "There is nothing to undo."]
    assert (chat.type("a"), chat.type("b")) == ("1", "2")
    assert chat.type("/retry") == "3"
    assert chat.talk.turns == [("a", "1"), ("b", "3")]
    assert chat.engine.prompts[-1] == chat.engine.prompts[-2] == "sys|a|1|b"
    assert chat.type("/undo") is None
    assert (chat.talk.turns, chat.said[-1]) == ([("a", "1")], "Forgotten: b")
    chat.type("/system " + "x" * 200)
    with pytest.raises(UsageError, match="does not fit"):
        chat.type("/retry")
    assert chat.talk.turns == [("a", "1")], "what cannot be answered anew is not lost"


def test_the_system_text() -> None:
    chat = Chat()
    chat.type("/system")
    chat.type("/system Sing\nin verse.")
    chat.type("a")
    assert chat.engine.prompts == ["Sing\nin verse.|a"]
    chat.type("/system none")
    chat.type("b")
    assert chat.engine.prompts[-1] == "a|1|b"
    assert chat.said == [
        "System text: sys", "System text: Sing\nin verse.", "There is no system text.",
    ]  # fmt: skip


def test_what_is_no_command_is_a_message() -> None:
    chat = Chat()
    for text in ("/etc/hosts is what?", "/sing a song", "a /undo", "/ x", "/"):
        assert chat.type(text) is not None, text
    assert chat.type("") is None
    assert chat.type("/sing") is chat.type("/udno") is None
    assert "There is no command /sing." in chat.said[0]
    assert "Did you mean /undo?" in chat.said[1]
    with pytest.raises(UsageError, match="/clear takes nothing more"):
        chat.type("/clear all")


def test_every_command_does_something_and_is_in_the_help() -> None:
    chat = Chat()
    chat.type("/help")
    for command in COMMANDS:
        assert f"{command.form} " in chat.said[0]
        assert command.name == "/exit" or callable(getattr(chat.commands, f"_{command.name[1:]}"))
    assert "Alt-Enter" in chat.said[0]
    piped = Chat(is_terminal=False)
    piped.type("/help")
    assert "/save" not in piped.said[0] + str([c for c in piped.said if "Alt" in c])
    for command in ("/save", "/load"):
        with pytest.raises(UsageError, match="for a terminal"):
            piped.type(f"{command} x.json")


def test_files_are_written_once_and_ones_own_again(tmp_path: Path) -> None:
    chat = Chat()
    for command in ("/save", "/load"):
        with pytest.raises(UsageError, match="needs a file"):
            chat.type(command)
    chat.type("a")
    path = tmp_path / "my chat.json"
    chat.type(f"/save {path}")
    chat.type("b")
    chat.type(f"/save {path}")
    content = json.loads(path.read_text())
    assert content["title"] == "a"
    assert [m["content"] for m in content["messages"]] == ["sys", "a", "1", "b", "2"]
    other = Chat()
    with pytest.raises(UsageError, match="already"):
        other.type(f"/save {path}")
    other.type(f"/load {path}")
    assert (other.talk.system, other.talk.turns) == ("sys", [("a", "1"), ("b", "2")])
    assert other.said == [f"Loaded 2 turns from {path}."]
    other.type("/undo")
    other.type(f"/save {path}")
    assert len(json.loads(path.read_text())["messages"]) == 3
    other.type("/clear")
    other.type("c")
    with pytest.raises(UsageError, match="already"):
        other.type(f"/save {path}")
    with pytest.raises(UsageError, match=r"my chat\.json/below\.json"):
        other.type(f"/save {path}/below.json")


def test_a_tilde_is_ones_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chat, other = Chat(), Chat()
    chat.type("a")
    chat.type("/save ~/a.json")
    assert chat.said == [f"Saved in {tmp_path}/a.json."]
    other.type("/load ~/a.json")
    assert other.talk.turns == [("a", "1")]


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("x" * 58 + " yy", "x" * 58 + "…"),
        (" a\n b ", "a b"),
        (" ", "New chat"),
    ],
)
def test_a_title_has_60_characters(question: str, title: str) -> None:
    system = {"role": "system", "content": "sys"}
    asked = [{"role": "user", "content": text} for text in (question, "later")]
    assert title_of([system, *asked]) == title
    assert title_of([system]) == "New chat"


def test_a_last_message_without_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"role": "user", "content": "a"}]')
    chat = Chat()
    chat.type(f"/load {path}")
    assert "/retry asks for it" in chat.said[0]
    assert chat.type("/retry") == "1"
    assert chat.talk.turns == [("a", "1")]


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), max_size=30) | (
    st.sampled_from(
        [f"## You <!-- {slashes}rorqual user -->" for slashes in ("", "\\", "\\\\")]
        + ["x\n# a <!-- rorqual chat -->\n", "\n", "", "# a", "<!-- rorqual"]
    )
)


@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=TEXTS | st.none())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("suffix", ["json", "md"])
def test_what_is_saved_is_loaded(
    suffix: str, turns: list[tuple[str, str]], system: str | None, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("chat") / f"a.{suffix}"
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]  # fmt: skip
    write_chat(path, messages)
    assert read_chat(path) == (system, turns)


def test_markdown_is_what_a_person_reads(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\nyou"},
        {"role": "assistant", "content": "# Hi\n## You <!-- rorqual user -->"},
    ]  # fmt: skip
    write_chat(tmp_path / "a.md", messages)
    assert (tmp_path / "a.md").read_text() == (
        "# Hello you <!-- rorqual chat -->\n\n## System <!-- rorqual system -->\n\nBe brief.\n\n"
        "## You <!-- rorqual user -->\n\nHello\nyou\n\n## Answer <!-- rorqual assistant -->\n\n"
        "# Hi\n## You <!-- \\rorqual user -->\n"
    )
    assert set(HEADINGS) == {"system", "user", "assistant"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("all.json", '{"format": "rorqual-chat", "chats": [{}, {}]}'),
        ("all.md", "# a <!-- rorqual chat -->\n\n# b <!-- rorqual chat -->\n"),
    ],
)
def test_a_file_of_several_chats_says_so(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=r"more than one chat.*\n.*2 chats"):
        read_chat(tmp_path / name)


def test_forms_of_others(tmp_path: Path) -> None:
    """The page's export, OpenAI's text parts and developer role, a record of a training file."""
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    developer = {"role": "developer", "content": "s"}
    for content, system in (
        ({"format": "rorqual-chat", "version": 1, "messages": [user, assistant]}, None),
        ({"messages": [parts, assistant | {"refusal": None}]}, None),
        ([developer, user, assistant], "s"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert read_chat(tmp_path / "a.json") == (system, [("a", "b")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("7", "has no messages"),
        ('{"messages": 7}', "has no messages"),
        ("[]", "no message in it"),
        ("[7]", "messages[0]"),
        ('[{"role": "assistant", "content": "a"}]', "found:    role 'assistant'"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]', "messages[1]"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]', "messages[1]"),
        ('[{"role": "tool", "content": "a"}]', "messages[0]"),
        ('[{"role": ["user"], "content": "a"}]', "messages[0]"),
        ('[{"role": {}, "content": "a"}]', "messages[0]"),
        ('[{"role": "user", "content": "\\ud800"}]', "messages[0]"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "messages[0]"),
        ('[{"role": "assistant", "content": null, "tool_calls": [{}]}]', "messages[0]"),
    ],
)
def test_what_is_no_conversation(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    chat = Chat()
    chat.type("a")
    with pytest.raises(UsageError) as caught:
        chat.type(f"/load {path}")
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert chat.talk.turns == [("a", "1")], "nothing is lost"
    with pytest.raises(UsageError, match="no such file"):
        chat.type(f"/load {tmp_path}/none.json")


# Settings


def test_every_field_of_sampling_can_be_set() -> None:
    """Each that the server honours, but those that make several answers, or show what a terminal
    has no place for; and each name of the page of the API.
    """
    elsewhere = {
        "n", "stream", "stream_options", "logprobs", "top_logprobs", "prompt_logprobs", "model",
        "user", "metadata", "store", "echo", "suffix", "best_of",
        "n_predict", "n_cmpl", "repeat_penalty", "no_stop_trim", "n_probs",  # others' names
    }  # fmt: skip
    assert set(SamplingFields.model_fields) - elsewhere == set(FIELDS)
    for name, attribute in FIELDS.items():
        assert hasattr(DEFAULTS, attribute), name
    assert set(CAN_BE_NONE) >= {"top_p", "seed", "allowed_token_ids"}


def test_the_list_has_each_with_value_and_range() -> None:
    lines = listed(replace(DEFAULTS, temperature=1.5, stop=("a b",)), DEFAULTS).splitlines()
    assert [line.split()[0] for line in lines] == list(FIELDS)
    assert lines[0].split(maxsplit=3) == ["temperature", "=", "1.5", "0..2; default 0.3"]
    assert any('stop = ["a b"]' in line for line in lines)
    ranges = {row.name: row.values for row in HONOURED}
    for line in lines:
        name = line.split()[0]
        assert ranges.get(name, "") in line or name == "max_tokens"


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("temperature=0.5", "temperature", 0.5),
        ("temperature = 2", "temperature", 2),
        ("top_k=0", "top_k", None),
        ("top_k=5", "top_k", 5),
        ("top_p=none", "top_p", None),
        ("seed=-1", "seed", 2**63 - 1),
        ("seed=none", "seed", None),
        ("stop=THE END", "stop", ("THE END",)),
        ('stop=["a", "\\n"]', "stop", ("a", "\n")),
        ("stop=[]", "stop", ()),
        ('logit_bias={"5": -100}', "logit_bias", {5: -100}),
        ("allowed_token_ids=[3, 4]", "allowed_token_ids", (3, 4)),
        ("stop_token_ids=[299]", "stop_token_ids", (299,)),
        ("max_tokens=7", "max_tokens", 7),
        ("max_tokens=-1", "max_tokens", 20),
        ("min_tokens=20", "min_tokens", 20),
        ("thinking_token_budget=3", "max_thinking_tokens", 3),
        ("ignore_eos=true", "ignore_eos", True),
        ("skip_special_tokens=true", "skip_special_tokens", True),
        ("include_stop_str_in_output=true", "include_stop_str_in_output", True),
        ("min_p=0.1", "min_p", 0.1),
        ("repetition_penalty=1.1", "repetition_penalty", 1.1),
        ("frequency_penalty=-2", "frequency_penalty", -2),
        ("presence_penalty=2", "presence_penalty", 2),
    ],
)
def test_a_value_changes_its_field_and_no_other(text: str, attribute: str, value: Any) -> None:
    before = replace(DEFAULTS, top_p=0.5)
    after = changed(text, before, DEFAULTS, NUM_IDS)
    assert getattr(after, attribute) == value
    assert replace(after, **{attribute: getattr(before, attribute)}) == before
    name = text.partition("=")[0].strip()
    reset = changed(f"{name}=default", after, DEFAULTS, NUM_IDS)
    assert getattr(reset, attribute) == getattr(DEFAULTS, attribute)


@pytest.mark.parametrize(
    "text",
    [
        "temperature=2.1", "temperature=-0.1", "temperature=hot", "temperature=true",
        "temperature=NaN", "temperature=none", "top_p=0", "top_p=1.1", "top_k=-2", "top_k=1.5",
        "min_p=2", "repetition_penalty=0", "frequency_penalty=3", "presence_penalty=-3",
        "stop=[7]", 'stop=""', "stop_token_ids=[300]", "stop_token_ids=7", 'logit_bias={"5": 101}',
        'logit_bias={"300": 1}', "allowed_token_ids=[]", "max_tokens=0", "min_tokens=21",
        "thinking_token_budget=-2", "ignore_eos=1", "seed=1e30", "temperature", "temperature=",
        "temprature=1", "n=2", "",
    ],
)  # fmt: skip
def test_a_value_that_the_server_refuses_is_told(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        changed(text, DEFAULTS, DEFAULTS, NUM_IDS)
    name = text.partition("=")[0]
    assert name in str(caught.value)
    if name == "temprature":
        assert "did you mean temperature?" in str(caught.value)


@pytest.mark.parametrize("text", ["top_k 5", "top_k  =  5", "top_k =5", "top_k=5"])
def test_a_space_parts_name_and_value_too(text: str) -> None:
    assert changed(text, DEFAULTS, DEFAULTS, NUM_IDS) == replace(DEFAULTS, top_k=5)


def test_what_a_setting_is_now_is_said() -> None:
    chat = Chat()
    for text in ('stop ["a b"]', "stop=default", "temperature 0", "temperature default"):
        chat.type(f"/set {text}")
    assert chat.said == ['stop = ["a b"]', "stop = []", "temperature = 0.0", "temperature = 0.3"]


def test_a_setting_holds_for_the_next_answer() -> None:
    chat = Chat()
    chat.type("/set temperature=1")
    chat.type("/set")
    assert chat.talk.params.temperature == 1
    assert chat.said[0] == "temperature = 1.0"
    assert chat.said[1] == listed(chat.talk.params, DEFAULTS)
    with pytest.raises(UsageError):
        chat.type("/set temperature=7")
    assert chat.talk.params.temperature == 1
