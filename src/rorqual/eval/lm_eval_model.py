"""Rorqual's engine as a model of lm-eval, EleutherAI's harness of public benchmarks.

Importing this registers the model `rorqual` there, and needs lm-eval, so nothing here imports it.
`python -m rorqual.eval.lm_eval_model` is lm-eval's own command line that knows the name besides:

    python -m rorqual.eval.lm_eval_model run --model rorqual --model_args pretrained=DIR --tasks ...

What lm-eval's other models do is done here too (cutting long texts on the left, windows of a
rolling likelihood, spaces that move to the continuation), so that scores can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from rorqual.engine import Engine, Output, Request, SamplingParams
from rorqual.errors import UsageError, listing
from rorqual.log import logger
from rorqual.weights import ModelFolder

MAX_GEN_TOKENS = 256  # lm-eval's own default for an answer
SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {
    "stop", "max_tokens", "logprobs", "prompt_logprobs", "grammar",
}  # fmt: skip
UNASKED_DEVICES = (None, "cuda:0")
Pair = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, and the ids of either."""


@register_model("rorqual")
class RorqualLM(TemplateLM):
    """A checkpoint folder, or the bundled model `tiny`, or an `engine` that is there already.

    `batch_size` answers run side by side. A text without begin-of-sentence token gets one unless
    `add_bos_token` is False. `max_gen_toks` counts for tasks that set no length of their own; None
    is 256 or half of the context. With `is_batch_invariant` the order of the questions changes no
    bit of the likelihoods. `device` is auto (a GPU where torch sees one), cpu, cuda or cuda:N.
    Choice: None and cuda:0 are auto too, for lm-eval's command line names cuda:0 unasked.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        dtype: str = "auto",
        speculate: int = 0,
        is_batch_invariant: bool = False,
        add_bos_token: bool = True,
        max_gen_toks: int | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine or Engine(
            pretrained,
            dtype=dtype,
            device="auto" if device in UNASKED_DEVICES else device,
            speculate=speculate,
            is_batch_invariant=is_batch_invariant,
            max_batch=_batch_size(batch_size, max_batch_size),
        )
        self.tokenizer = self.engine.tokenizer
        self.max_length = self.engine.max_positions - 1  # one place is the answer's
        self.max_gen_toks = max_gen_toks or min(MAX_GEN_TOKENS, self.max_length // 2)
        # A checkpoint's answers end where `generate` ends them; of an engine none is known.
        folder = ModelFolder.find(pretrained) if engine is None else None
        self._end_ids = folder.sampling().get("stop_token_ids", ()) if folder is not None else ()
        self._has_bos = add_bos_token
        self._name = pretrained

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text; without `add_generation_prompt` the last message goes on."""
        messages: list[dict[str, Any]] = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["prefix"] = True
        return self.tokenizer.render_chat(messages, None, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Names of special tokens become their ids, since prompts arrive as rendered templates."""
        has_bos = self._has_bos if add_special_tokens is None else add_special_tokens
        is_begun = string.startswith(self.tokenizer.bos_token)
        return self.tokenizer.encode(string, has_bos and not is_begun, allow_special=True)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Each text's log-probability, in windows of the context that overlap in one token."""
        pairs: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            begun = len(pairs)
            pairs += [(("", ""), *make_disjoint_window(window)) for window in windows]
            counts.append(len(pairs) - begun)
        scored = iter(self._loglikelihood_tokens(pairs, disable_tqdm))
        sums = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts, without the stop string that ended them."""
        outputs = self._answer(
            (self._request(*r.args) for r in requests), len(requests), disable_tqdm
        )
        texts = [output.text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would give it).

        UsageError for a continuation that is longer than the context.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        for _, context, wanted in requests:
            self._check_length(len(context), len(wanted))
        prompts = [(context + wanted)[-self.max_length :] for _, context, wanted in requests]
        asked = (Request(prompt, params) for prompt in prompts)
        results = []
        outputs = self._answer(asked, len(prompts), disable_tqdm)
        for (texts, _, wanted), output in zip(requests, outputs, strict=True):
            results.append(_score(output, len(wanted)))
            if any(texts):  # windows of a rolling likelihood are no questions of their own
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _check_length(self, num_context: int, num_wanted: int) -> None:
        if num_wanted >= self.max_length:
            raise UsageError(
                "the task has a continuation that does not fit the context",
                found=f"{num_wanted} tokens",
                expected=f"less than {self.max_length}",
            )
        if num_context + num_wanted > self.max_length:
            logger(__name__).warning("a context of %d tokens is cut on its left", num_context)

    def _answer(
        self, requests: Iterable[Request], count: int, disable_tqdm: bool
    ) -> Iterator[Output]:
        outputs = self.engine.generate_each(requests)
        return iter(tqdm(outputs, total=count, desc="Asking the engine", disable=disable_tqdm))

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """UsageError for a setting that has no meaning here, and an answer longer than all."""
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        max_tokens, stops = int(chosen.pop("max_gen_toks")), chosen.pop("until")
        chosen.pop("do_sample")  # `temperature` says the same
        if unknown := sorted(set(chosen) - SAMPLING):
            raise UsageError(
                f"unknown generation setting {unknown[0]!r}", expected=listing(sorted(SAMPLING))
            )
        if max_tokens >= self.max_length:
            raise UsageError(
                "the task's answers do not fit the context",
                found=f"max_gen_toks {max_tokens}",
                expected=f"less than {self.max_length}",
                fix="--gen_kwargs max_gen_toks=...",
            )
        chosen.setdefault("temperature", 0.0)
        chosen.setdefault("stop_token_ids", self._end_ids)
        stop = tuple(filter(None, stops))
        params = SamplingParams(max_tokens=max_tokens, stop=stop, **chosen)
        return Request(self.tok_encode(context)[max_tokens - self.max_length :], params)


def _score(output: Output, num_wanted: int) -> tuple[float, bool]:
    """What the last tokens of the prompt got."""
    assert output.prompt_logprobs is not None, "asked for"
    total, is_greedy = 0.0, True
    for entry in output.prompt_logprobs[len(output.prompt_logprobs) - num_wanted :]:
        assert entry is not None, "only the first token of a prompt has none"
        total += entry.logprob
        is_greedy = is_greedy and entry.logprob == entry.top[0][1]
    return total, is_greedy


def _batch_size(asked: int | str, limit: int | None) -> int:
    """lm-eval's command line gives text, and `auto` for "as many as fit": the engine's default."""
    if isinstance(asked, str) and asked.startswith("auto"):
        return limit or 32
    return int(asked)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
