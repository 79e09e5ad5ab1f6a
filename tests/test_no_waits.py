"""The host waits for a GPU once a step, and nowhere within it.

The oracle needs no GPU: tensors on the meta device take the GPU's path and hold no values, so
whatever brings one to the host (`item`, `tolist`, a truth value, `nonzero`, a boolean index)
raises. What makes the host wait while it sends values the other way is refused by a mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rorqual.engine import SamplingParams
from rorqual.engine.flat_step import Span
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.logprobs import token_logprobs
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Scores, verify
from rorqual.model import empty
from rorqual.ops import cross_entropy, grouped_gemm
from rorqual.ops.attention import attention
from rorqual.train import step as steps
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.recompute import recompute_layers
from rorqual.train.step import Stepper, StepResult, StepValues
from rorqual.weights import ModelFolder
from small import LITTLE

META = torch.device("meta")
CONFIG = LITTLE.with_changes(vocab_size=64, n_group=4, topk_group=2, max_position_embeddings=4096)
READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}


class RefuseWaitingCopies(TorchFunctionMode):
    """Host values may go to the device only by a copy that the host does not wait for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        makes = name in ("tensor", "as_tensor", "new_tensor")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.device == META:
            assert not makes, f"{name}() puts host values on the device"
            is_sent = name in ("to", "copy_") and _comes_from_host(name, args)
            assert not is_sent or kwargs.get("non_blocking"), f"{name}() waits for its copy"
        return result


def _comes_from_host(name: str, args: Any) -> bool:
    source = args[1] if name == "copy_" else args[0]
    return bool(source.device.type == "cpu")


class CountReads(TorchFunctionMode):
    """Counts what would bring values from a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.update({getattr(func, "__name__", "")} & READS)
        return func(*args, **(kwargs or {}))


def test_the_oracle_sees_waits() -> None:
    x = torch.zeros(3, device=META)
    for read in (Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.cpu, bool, float):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(x[:1])  # type: ignore[operator]
    with pytest.raises(NotImplementedError):
        x[x > 0]
    with RefuseWaitingCopies(), pytest.raises(AssertionError, match="puts host values"):
        torch.tensor([1], device=META)
    with RefuseWaitingCopies(), pytest.raises(AssertionError, match="waits"):
        torch.zeros(1).to(META)
    with CountReads() as counts:
        assert bool(torch.ones(1))
        assert torch.ones(2).tolist() == [1, 1]
    assert counts.names == {"__bool__": 1, "tolist": 1}


@pytest.mark.parametrize("use_checkpointing", [False, True])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_training_step_waits_once(
    monkeypatch: pytest.MonkeyPatch, moments: Any, use_checkpointing: bool
) -> None:
    """Forward, backward, clipping, AdamW and the router bias, with isolated documents."""
    reads = []

    def read(
        losses: Tensor, loads_LE: Tensor, norm: Tensor, counts_C: Tensor, names: Any
    ) -> StepResult:
        reads.append((loads_LE.shape, norm.device, counts_C.device))
        return StepResult(1.0, 1.0, [1.0], 0.0, 1.0, 1, torch.zeros(2, 8))

    monkeypatch.setattr(steps, "_read", read)
    model = empty(CONFIG, device="meta").to(META).train()
    if use_checkpointing:
        recompute_layers(model)
    optimizer = AdamW(model, OptimizerSettings(moments=moments))
    stepper = Stepper(model, optimizer, micro_batch_size=2)
    tokens_BS = torch.zeros(4, 18, dtype=torch.int64, device=META)
    with RefuseWaitingCopies():
        stepper.step(
            tokens_BS,
            torch.ones_like(tokens_BS, dtype=torch.bool),
            StepValues(1, 1, 1, 1),
            documents_BS=torch.ones_like(tokens_BS),
        )
    assert reads == [((2, 8), META, META)]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_steps_numbers_come_in_one_read() -> None:
    model = empty(CONFIG)
    model.reset_parameters()
    stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=2)
    tokens_BS = torch.randint(0, 64, (4, 18))
    before = dict(model.named_parameters())["model.norm.weight"].clone()
    with CountReads() as counts:
        result = stepper.step(tokens_BS, tokens_BS >= 0, StepValues(0.1, 0.3, 1e-4, 0.01))
    assert counts.names == {"tolist": 1}
    assert result.num_targets == 4 * 16
    assert result.loads_LE.sum(1).tolist() == [4 * 16 * 2] * 2  # each token, two experts a layer
    assert not torch.equal(before, model.model.norm.weight)


def test_the_opaque_operators_do_not_wait() -> None:
    """What the step's operators do inside, which meta tensors do not see from outside."""
    x_NI = torch.zeros(6, 16, dtype=torch.bfloat16, device=META)
    weight_EOI = torch.zeros(4, 24, 16, dtype=torch.bfloat16, device=META)
    counts_E = torch.zeros(4, dtype=torch.int64, device=META)
    y_NO = grouped_gemm._multiply(x_NI, weight_EOI, counts_E, transposed=True)
    assert y_NO.shape == (6, 24)
    assert grouped_gemm._multiply(y_NO, weight_EOI, counts_E, transposed=False).shape == (6, 16)
    assert grouped_gemm._weight_gradient(y_NO, x_NI, weight_EOI, counts_E).shape == (4, 24, 16)
    is_target_N = torch.zeros(6, dtype=torch.bool, device=META)
    targets_N = torch.zeros(6, dtype=torch.int64, device=META)
    total, grad_h, grad_weight = cross_entropy._all_rows(
        x_NI, weight_EOI[0], targets_N, is_target_N
    )
    assert (total.shape, grad_h.shape, grad_weight.shape) == ((), (6, 16), (24, 16))


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "num_key_heads"),
    [(16, 16, 4), (4, 16, 4), (1, 16, 4), (1, 16, 1), (3, 16, 1), (2048, 16384, 1)],
)
def test_attention_does_not_wait(num_queries: int, num_keys: int, num_key_heads: int) -> None:
    q = torch.zeros(1, 4, num_queries, 24, dtype=torch.bfloat16, device=META)
    k = torch.zeros(1, num_key_heads, num_keys, 24, dtype=torch.bfloat16, device=META)
    with RefuseWaitingCopies():
        assert attention(q, k, k[..., :16], None, 0.3).shape == (1, 4, num_queries, 16)


@pytest.mark.parametrize("kind", ["auto", "fp8", "q8"])
def test_an_engine_step_does_not_wait(kind: Any) -> None:
    """Prefill of two prompts, one in chunks, beside decoding with drafts, and an MTP depth."""
    model = empty(CONFIG, torch.bfloat16, "meta").to(META).eval()
    like = model.model.embed_tokens.weight.detach()
    cache = PagedLatentCache(CONFIG, (200, 16), kind, like, 1)
    runner = Runner(model, cache)
    spans = [
        Span([1] * 40, 0, [3, 4, 5]),
        Span([1] * 20, 1200, [*range(100, 177)]),
        Span([1, 2], 27, [6, 9]),
        Span([1, 2], 17, [7, 8]),
        Span([5], 64, [10, 11, 12, 13, 14]),
        Span([5], 3, [15]),
    ]
    with RefuseWaitingCopies():
        hidden = runner.run(spans)
        rows = [h_TD.clone() for h_TD in hidden]
        later = [Span(span.token_ids, span.start + 1, span.blocks) for span in spans[1:]]
        runner.run_mtp(1, later, rows[1:])
        assert runner.logits(hidden[0]).shape == (40, 64)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    return ModelFolder.find("tiny").load_tokenizer()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choosing_tokens_reads_once(
    tokenizer: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without filters: 20 answers with a draft each, more rows than are drawn at a time."""
    monkeypatch.setattr(Tensor, "is_cpu", False)  # the GPU's way, on values
    params = SamplingParams(temperature=temperature, seed=0)
    states = [SamplingState(params, [1], tokenizer, GrammarCompiler(tokenizer)) for _ in range(20)]
    for state in states:
        state.uniform(1)  # the random numbers are the host's own
    logits_NV = torch.randn(40, tokenizer.vocab_size)
    with CountReads() as counts:
        verify(Scores(logits_NV), [[7]] * 20, states)
    assert counts.names == {"tolist": 1}


def test_log_probabilities_come_in_one_read() -> None:
    logits_NV = torch.randn(3, 50)
    with CountReads() as counts:
        rows = token_logprobs(logits_NV, [4, 5, 6], 2, 40)
    assert counts.names == {"tolist": 1}
    expected = logits_NV[:, :40].log_softmax(-1)
    for n, row in enumerate(rows):
        assert row.logprob == pytest.approx(float(expected[n, 4 + n]), abs=1e-5)
        assert [token_id for token_id, _ in row.top] == logits_NV[n, :40].topk(2).indices.tolist()
