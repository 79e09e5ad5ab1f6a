"""`rorqual chat`: a conversation in the terminal, or over a pipe one message a line."""

from __future__ import annotations

from dataclasses import replace

from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.options import (
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TokenizerPath,
    TopK,
    TopP,
    loading,
)
from rorqual.cli.terminal import converse, opening

MAX_DRAFTS = 2
"""With an MTP module; the engine takes as many of these as pay."""


@with_engine_flags
def chat(
    model: Model = "tiny",
    tokenizer: TokenizerPath = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = None,
    system: System = None,
    *,
    flags: EngineFlags,
) -> None:
    """Talk with a model in the terminal.

    With standard input piped, each line is a message of one conversation, the answers go to
    standard output, and the program ends with the input. /help shows the commands: /retry, /undo,
    /clear, /system, /set, and at a terminal /save and /load.

    \b
    Examples:
      rorqual chat
      rorqual chat --model DIR --temperature 0
      rorqual chat --model DeepSeek-V3-Q4_K_M-00001-of-00009.gguf
      echo "What is 12 + 30?" | rorqual chat
    """
    with loading(model):
        from rorqual.engine import Conversation, Engine, SamplingParams
        from rorqual.weights import ModelFolder

        options = flags.options()
        folder = ModelFolder.find(model, tokenizer)
        params = SamplingParams(
            **folder.sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                max_tokens=max_new_tokens,
            )
        )
        vocabulary = folder.load_tokenizer()
        weights = flags.model(folder, vocabulary, options)
        # Whoever gives a seed wants the same text again: drafts, as many as pay just now, keep it
        # only up to rounding (`Engine`).
        if flags.speculate is None and seed is None and weights.config.num_nextn_predict_layers:
            options = replace(options, speculate=MAX_DRAFTS)
        engine = Engine(weights, vocabulary, options)
    converse(Conversation(engine, params, system), opening(folder))
