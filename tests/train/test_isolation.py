"""Isolated documents. Oracle: the same model on each document alone, at every MTP depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from small_run import LENGTH
from torch import Tensor

from rorqual.data import Batch
from rorqual.model import DeepseekV3
from rorqual.model.balance import sequence_balance_loss, sequence_loads
from rorqual.model.mtp import documents_at
from rorqual.train.loss import (
    LossParts,
    TrainingModel,
    balance_seen,
    coefficients,
    target_counts,
)
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.step import InTurn, Stepper, StepValues
from rorqual.train.validation import validate

FLOAT32 = 1e-5  # relative: other orders of float32 sums
BEGIN, PAD = 63, 0
MTP_WEIGHT = 0.3
MakeModel = Callable[..., DeepseekV3]

# Lengths of the documents of a sample of LENGTH + 1 tokens; what is left is padding.
LAYOUTS = [
    *([offset, LENGTH + 1 - offset] for offset in range(1, LENGTH + 1)),  # every offset
    [1, 2, 3, 4, 5],  # shorter than the depths, and padding
    [2, 2, 2, 2, 2, 2, 2, 2, 1],
    [LENGTH + 1],
    [LENGTH],
    [3, 9],
]


def packed(layout: Sequence[int], num_depths: int, seed: int = 0) -> tuple[Tensor, ...]:
    """(tokens_BS, mask_BS, documents_BS) with B = 1, and the documents one by one behind them."""
    generator = torch.Generator().manual_seed(seed)
    width = LENGTH + 1 + num_depths
    tokens = torch.full((1, width), PAD)
    documents = torch.zeros(1, width, dtype=torch.int64)
    mask = torch.zeros(1, width, dtype=torch.bool)
    place, alone = 0, []
    for number, length in enumerate(layout, 1):
        document = torch.randint(1, BEGIN, (1, length), generator=generator)
        document[0, 0] = BEGIN
        here = slice(place, place + length)
        tokens[:, here], documents[:, here], mask[:, here] = document, number, True
        alone.append(document)
        place += length
    return tokens, mask, documents, *alone


def losses_alone(
    model: DeepseekV3, alone: Sequence[Tensor], num_depths: int
) -> tuple[list[Tensor], list[int]]:
    """Sums of cross entropies and counts of targets by depth, over documents run alone."""
    sums: list[Tensor] = [torch.zeros(()) for _ in range(num_depths + 1)]
    counts = [0] * (num_depths + 1)
    for document in alone:
        length = document.shape[1]
        if length < 2:
            continue
        h = model.hidden(document)
        for depth in range(num_depths + 1):
            num = length - depth  # positions that exist at this depth
            if num < 1:
                break
            if depth:
                h = model.mtp_hidden(depth, h[:, :num], document[:, depth:])
            targets = document[:, depth + 1 :]
            if targets.shape[1]:
                logits = model.head(h[:, : targets.shape[1]])
                sums[depth] = sums[depth] + F.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="sum"
                )
                counts[depth] += targets.shape[1]
    return sums, counts


def lively(model: DeepseekV3) -> DeepseekV3:
    """Larger weights, so that a leak would show."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def run_packed(
    model: DeepseekV3, tokens: Tensor, mask: Tensor, documents: Tensor, num_depths: int
) -> LossParts:
    counts = target_counts(mask, num_depths, documents)
    by = coefficients(counts, tokens.shape[0], MTP_WEIGHT, balance_alpha=0.0)
    parts: LossParts = TrainingModel(model)(
        tokens_BS=tokens, documents_BS=documents, mask_BS=mask, by=by
    )
    return parts


@pytest.mark.parametrize("num_depths", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_packed_equals_alone_in_loss_and_gradient(
    make_model: MakeModel, layout: list[int], num_depths: int
) -> None:
    model = lively(make_model(num_nextn_predict_layers=num_depths))
    tokens, mask, documents, *alone = packed(layout, num_depths)
    parts = run_packed(model, tokens, mask, documents, num_depths)
    parts.total.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    sums, counts = losses_alone(model, alone, num_depths)
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    assert target_counts(mask, num_depths, documents).tolist() == counts
    for depth, mean in enumerate(means):
        found_mean = float(parts.cross_entropy_C[depth])
        assert found_mean == pytest.approx(float(mean.detach()), rel=FLOAT32)
    weight = MTP_WEIGHT / max(num_depths, 1)
    total = means[0] + weight * sum(means[1:], torch.zeros(()))
    total.backward()
    for name, parameter in model.named_parameters():
        expected, gradient = parameter.grad, found[name]
        if expected is None:  # alone, a depth beyond every document never ran
            assert gradient is None or not gradient.any(), name
            continue
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=FLOAT32 * max(scale, 1e-3))


@pytest.mark.parametrize("layout", [[5, 12], [1, 2, 3, 4, 5], [2, 15], [9, 3]])
def test_packed_equals_alone_in_hidden_states(make_model: MakeModel, layout: list[int]) -> None:
    model = lively(make_model(num_nextn_predict_layers=2))
    tokens, _, documents, *alone = packed(layout, 2)
    with torch.no_grad():
        step = model.model.step(tokens[:, :LENGTH], documents[:, :LENGTH])
        h, starts = model.hidden(tokens[:, :LENGTH], step), [0]
        for length in layout:
            starts.append(starts[-1] + length)
        hs_alone = [model.hidden(document) for document in alone]
        for depth in range(3):
            if depth:
                positions = documents_at(depth, documents, LENGTH)
                following = tokens[:, depth : LENGTH + depth]
                step = model.model.step(following, positions)
                h = model.mtp_hidden(depth, h, following, step)
            assert h.isfinite().all()
            for number, document in enumerate(alone):
                num = min(document.shape[1] - depth, LENGTH - starts[number])
                if num < 1:
                    continue
                if depth:
                    before = hs_alone[number][:, : document.shape[1] - depth]
                    own = model.mtp_hidden(depth, before, document[:, depth:])
                    hs_alone[number] = own
                here = h[:, starts[number] : starts[number] + num]
                own = hs_alone[number][:, :num]
                assert float((here - own).norm() / own.norm()) < FLOAT32, (depth, number)


@pytest.mark.parametrize("num_depths", [1, 2])
def test_a_changed_document_moves_nothing_of_its_neighbour(
    make_model: MakeModel, num_depths: int
) -> None:
    """Nor does document 2's loss reach document 1's embeddings: their gradient is exactly zero."""
    model = lively(make_model(num_nextn_predict_layers=num_depths, tie_word_embeddings=False))
    tokens, mask, documents, *_ = packed([7, 10], num_depths)
    only_second = mask & (documents == 2)
    losses = []
    for change in (0, 1):
        changed = tokens.clone()
        changed[0, 1:7] = (changed[0, 1:7] + change) % BEGIN
        losses.append(run_packed(model, changed, only_second, documents, num_depths))
    # Other experts are busy beside them, so sums run in another order.
    torch.testing.assert_close(
        losses[0].cross_entropy_C, losses[1].cross_entropy_C, rtol=FLOAT32, atol=0
    )
    losses[0].total.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    only_in_first = {int(t) for t in tokens[0, 1:7]} - {int(t) for t in tokens[0, 7:17]}
    assert only_in_first
    assert not gradient[sorted(only_in_first)].any()
    assert gradient[tokens[0, 8:16]].any()


def test_documents_at_a_depth_closed_form() -> None:
    documents = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0, 0]])
    assert documents_at(0, documents, 6).tolist() == [[1, 1, 1, 2, 3, 3]]
    assert documents_at(1, documents, 6).tolist() == [[1, 1, 0, 0, 3, 0]]
    assert documents_at(2, documents, 6).tolist() == [[1, 0, 0, 0, 0, 0]]
    assert documents_at(3, documents, 6).tolist() == [[0] * 6]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_equals_one_large_batch_of_packed_documents(
    make_model: MakeModel, micro_batch_size: int
) -> None:
    """The depths' own counts differ from micro-batch to micro-batch, and some are zero."""
    layouts = [[17], [1] * 17, [2, 3, 4], [5, 12]]
    rows = [packed(layout, 2, seed) for seed, layout in enumerate(layouts)]
    tokens, mask, documents = (torch.cat([row[i] for row in rows]) for i in range(3))
    values = StepValues(lr=1e-3, mtp_weight=0.3, balance_alpha=1e-2, bias_update_speed=0.0)
    results = []
    for size in (4, micro_batch_size):
        model = lively(make_model(num_nextn_predict_layers=2))
        stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=size)
        results.append(stepper.step(tokens, mask, values, documents))
    one, many = results
    assert many.loss == pytest.approx(one.loss, rel=FLOAT32)
    assert many.mtp == pytest.approx(one.mtp, rel=FLOAT32)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=FLOAT32)
    assert torch.equal(many.loads_LE, one.loads_LE)


def test_what_exists_in_no_document_has_no_load(make_model: MakeModel) -> None:
    """Closed form: K choices for each token at depth 0, one position fewer a document and depth."""
    tokens, mask, documents, *_ = packed([5, 7], 2)
    model = make_model(num_nextn_predict_layers=2)
    run_packed(model, tokens, mask, documents, 2).total.backward()
    assert balance_seen(model).loads_LE.sum(1).tolist() == [2 * 12, 2 * (12 - 2), 2 * (12 - 4)]


def test_balance_loss_is_that_of_the_positions_that_exist() -> None:
    """Oracle: the same function on those rows alone."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(12, 4, generator=generator)
    experts = torch.randint(0, 4, (12, 2), generator=generator)
    exists = torch.tensor([True] * 6 + [False] * 3 + [True] * 3)
    counts = sequence_loads(experts, 1, 4, exists)
    alone = sequence_loads(experts[exists], 1, 4)
    assert torch.equal(counts, alone)
    found = sequence_balance_loss(scores, counts, exists)
    torch.testing.assert_close(found, sequence_balance_loss(scores[exists], alone))
    nobody = torch.zeros(12, dtype=torch.bool)
    assert sequence_balance_loss(scores, sequence_loads(experts, 1, 4, nobody), nobody) == 0


def test_one_document_a_sample_is_what_no_isolation_gives(make_model: MakeModel) -> None:
    """Isolation of a single document that fills the sample changes neither loss nor load."""
    model = make_model(num_nextn_predict_layers=2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, BEGIN, (2, LENGTH + 3), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    by = coefficients(target_counts(mask, 2), 2, MTP_WEIGHT, balance_alpha=1e-2)
    root = TrainingModel(model)
    given = {"tokens_BS": tokens, "mask_BS": mask, "by": by}
    plain, isolated = root(**given), root(documents_BS=torch.ones_like(tokens), **given)
    torch.testing.assert_close(isolated.total, plain.total, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(isolated.cross_entropy_C, plain.cross_entropy_C)
    seen = []
    for parts in (plain, isolated):
        parts.total.backward()
        seen.append(balance_seen(model))
    assert torch.equal(seen[0].loads_LE, seen[1].loads_LE)
    torch.testing.assert_close(seen[0].loss, seen[1].loss, rtol=FLOAT32, atol=0)


@pytest.mark.slow
def test_the_isolated_step_is_one_graph(make_model: MakeModel) -> None:
    tokens, mask, documents, *_ = packed([5, 7], 2)
    values = StepValues(lr=1e-3, mtp_weight=0.3, balance_alpha=1e-2, bias_update_speed=0.0)
    results = []
    for is_traced in (False, True):
        model = make_model(num_nextn_predict_layers=2)
        run = InTurn(model)
        if is_traced:
            run.loss = torch.compile(TrainingModel(model), backend="aot_eager", fullgraph=True)
        stepper = Stepper(model, AdamW(model, OptimizerSettings()), run, micro_batch_size=1)
        results.append(dataclasses.asdict(stepper.step(tokens, mask, values, documents)))
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=FLOAT32)
    assert torch.equal(results[1]["loads_LE"], results[0]["loads_LE"])


class HeldOut:
    """Packed rows, one a sample."""

    def __init__(self, rows: Sequence[tuple[Tensor, ...]]) -> None:
        self.rows = rows

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        own = self.rows[counter : counter + num_samples]
        assert len(own) == num_samples
        tokens, mask, documents = (torch.cat([row[i] for row in own]) for i in range(3))
        return Batch(tokens, mask, documents)


def test_validation_of_packed_documents_equals_each_alone(make_model: MakeModel) -> None:
    """With a last batch that is smaller, targets outside the mask, and ids that are no text."""
    model = lively(make_model())
    rows = [packed(layout, 0, seed) for seed, layout in enumerate(([5, 12], [1, 3, 4], [17]))]
    # Every third id stands for no byte; a document's first does, as where a long text was cut.
    bytes_V = (torch.arange(64) + 1) % 3
    assert bytes_V[BEGIN] > 0
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for _, mask, _, *alone in rows:
        mask[0, 3::4] = False
        place = 0
        for document in alone:
            length = document.shape[1]
            with torch.no_grad():
                losses = F.cross_entropy(
                    model(document)[0, :-1], document[0, 1:], reduction="none"
                ).tolist()
            for offset, loss in enumerate(losses, 1):
                size = int(bytes_V[document[0, offset]])
                if mask[0, place + offset] and size:
                    nats, num_tokens, num_bytes = nats + loss, num_tokens + 1, num_bytes + size
            place += length
    found = validate(model, HeldOut(rows), bytes_V, num_samples=3, batch_size=2, num_inputs=LENGTH)
    assert (found.num_tokens, found.num_bytes) == (num_tokens, num_bytes)
    assert found.nats == pytest.approx(nats, rel=FLOAT32)
    assert model.training
