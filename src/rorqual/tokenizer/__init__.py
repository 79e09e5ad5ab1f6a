"""Text to ids and back: V3's tokenizer, others of its kind, chats, tool calls and streams."""

from rorqual.tokenizer.load import deepseek_v3, has_tokenizer, load_tokenizer
from rorqual.tokenizer.stream import StreamDecoder
from rorqual.tokenizer.tokenizer import Tokenizer
from rorqual.tokenizer.tool_calls import parse_tool_calls
from rorqual.tokenizer.train import train_tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "deepseek_v3",
    "has_tokenizer",
    "load_tokenizer",
    "parse_tool_calls",
    "train_tokenizer",
]
