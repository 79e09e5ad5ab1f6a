"""`rorqual demo-generate`: the flags of DeepSeek's demo, on one process and any machine.

The flags and their defaults are those of `inference/generate.py` in github.com/deepseek-ai/
DeepSeek-V3, and so is the form of its output, so that commands and scripts made for it go on
working. What differs is said in the help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.generate import Batch, check_input_file, check_sources
from rorqual.cli.options import loading
from rorqual.cli.request_lines import Reader
from rorqual.cli.terminal import converse, opening, shown

SEED = 0
BATCH_SIZE = 8


@with_engine_flags
def demo_generate(
    ckpt_path: Annotated[
        str,
        typer.Option(metavar="DIR", help="The rank shards, tokenizer files beside them."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            help="The demo's configuration, such as config_671B.json. "
            "[default: config.json or model_args.json in DIR]",
        ),
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="A conversation; /clear forgets, /exit leaves.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, as in the demo.")
    ] = 0.2,
    *,
    flags: EngineFlags,
) -> None:
    """Generate with the flags of DeepSeek's demo, generate.py, from its rank shards.

    One process puts the ranks together, so start it without torchrun. Every prompt is a message
    to the model. Any number of prompts, of any length that the model takes; empty lines are
    skipped. An answer ends as with `rorqual generate`. The same command gives the same text each
    time, but no random choice is the demo's.

    `rorqual convert DIR SHARDS --to shards:N` writes such shards; `rorqual generate` can do more.

    \b
    Examples:
      rorqual demo-generate --ckpt-path V3-mp16 --config config_671B.json --interactive
      rorqual demo-generate --ckpt-path V3-mp16 --config config_671B.json --input-file prompts.txt
    """
    check_sources({"--input-file": input_file, "--interactive": interactive or None}, None)
    if input_file is not None:
        check_input_file(input_file)
    with loading(ckpt_path):
        from rorqual.engine import Conversation, SamplingParams
        from rorqual.serve.settings import ServedModel
        from rorqual.weights import ModelFolder

        options = flags.options(max_batch=BATCH_SIZE)
        folder = ModelFolder.find(ckpt_path, shards_config=config)
        # The demo's own flags say how to sample; where an answer ends, the checkpoint knows.
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            seed=SEED,
            stop_token_ids=folder.sampling().get("stop_token_ids", ()),
        )
        served = ServedModel(
            name=folder.name,
            tokenizer=folder.load_tokenizer(),
            max_positions=folder.max_positions(),
            defaults=params,
        )
        reader = Reader(served, is_chat=True, is_plain=True)
        num_lines = 0
        if input_file is not None:
            num_lines = reader.check(input_file)
        engine = flags.engine(folder, served.tokenizer, options)
    if input_file is None:
        converse(Conversation(engine, params), opening(folder))
        return
    for answer in Batch(engine, reader, input_file, num_lines).answers():
        text = f"Prompt: {answer.item['prompt']}\nCompletion: {answer.texts[0]}\n"
        print(shown(text), flush=True)
