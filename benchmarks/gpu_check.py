"""What a GPU makes of Rorqual: parts of at most four minutes, without a network.

    make gpu-check PART=infer WHEELS=wheels      # on a machine with a GPU; docs/gpu.md
    make gpu-check PART=train WHEELS=wheels
    PYTHONPATH=src python benchmarks/gpu_check.py infer --device cpu --quick   # a rehearsal

Correctness rows compare with the CPU, speed rows measure. The result (JSON, and the same as a table
in Markdown) is written anew after every row, so a run that is cut off keeps what it has. Exit code:
0, or 1 if a row failed, or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
    from torch import Tensor

    from rorqual.engine import Engine, SamplingParams
    from rorqual.engine.draft_policy import FixedDrafts
    from rorqual.errors import RorqualError
    from rorqual.files import atomic_write, write_json
    from rorqual.model import DeepseekV3, ModelConfig, build, empty, preset
    from rorqual.ops.device import resolve_device
    from rorqual.train.loss import TrainingModel, coefficients, target_counts
    from rorqual.train.optimizer import AdamW, OptimizerSettings
    from rorqual.train.precision import compute_in
    from rorqual.train.step import Stepper, StepValues
    from rorqual.weights import ModelFolder
except ModuleNotFoundError as problem:
    print(
        f"gpu-check: this Python has no {problem.name}\n"
        "  fix:      fetch the wheels on a machine with a network, benchmarks/gpu_wheels.sh DIR,\n"
        "            and say WHEELS=DIR; torch itself is the image's",
        file=sys.stderr,
    )
    sys.exit(2)

EXIT_FAILED, EXIT_NO_GPU = 1, 2
QUESTIONS = (
    "What is 347 + 586?",
    "What is the capital of Japan?",
    "Convert 3 feet to inches",
    "Python: print the word lark backwards",
)
# Relative to the size of what is compared. Float32 differs in the order of sums alone; bfloat16
# keeps 8 bits, and a score near a tie may choose another expert.
FLOAT32_BAR, BFLOAT16_BAR = 1e-3, 1e-1
DTYPES = {"float32": (torch.float32, FLOAT32_BAR), "bfloat16": (torch.bfloat16, BFLOAT16_BAR)}
STEP_VALUES = StepValues(lr=1e-3, mtp_weight=0.3, balance_alpha=1e-4, bias_update_speed=1e-3)


@dataclass(frozen=True)
class Sizes:
    """What the rows measure. `QUICK` is a stand-in for CPUs, without bfloat16: its kernels there
    take longer to compile than all else.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    infer_preset: str = "16b"
    infer_dtype: torch.dtype = torch.bfloat16
    prompt_tokens: int = 2048
    answer_tokens: int = 64
    streams: tuple[int, ...] = (1, 32)
    train_preset: str = "small"
    train_length: int = 1024
    train_batch: int = 16
    train_steps: int = 5


QUICK = Sizes(("float32",), "tiny", torch.float32, 64, 4, (1, 2), "tiny", 64, 2, 1)


@dataclass
class Check:
    """One part's run: rows so far, and the files that they go to."""

    part: str
    device: torch.device
    sizes: Sizes
    file: Path
    limit_seconds: float
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Runs `measure` and writes what it found; `is_good: False` in it, or an error, fails."""
        seconds = time.monotonic() - self.started
        row: dict[str, Any] = {"row": name}
        if seconds > self.limit_seconds:
            row |= {"state": "left out", "note": f"{seconds:.0f} s were over before it began"}
        else:
            try:
                found = measure()
                row |= {"state": "ok" if found.pop("is_good", True) else "FAILED", **found}
            # The row says what went wrong, the others still run, and the exit code tells.
            except (RuntimeError, ValueError, AssertionError, RorqualError) as problem:
                what = f"{type(problem).__name__}: {problem}".splitlines()[0]
                row |= {"state": "FAILED", "note": what[:300]}
        row["seconds"] = round(time.monotonic() - self.started - seconds, 1)
        self.rows.append(row)
        self.write()
        print(_line(row), flush=True)

    def write(self) -> None:
        write_json(self.file, {"part": self.part, **_machine(self.device), "rows": self.rows})
        with atomic_write(self.file.with_suffix(".md"), "w") as file:
            file.write(markdown(self.part, _machine(self.device), self.rows))

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, on the device too."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> dict[str, Any]:
        """The most that tensors took since the last call, in GB; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_gb": round(peak / 1e9, 2)}


# infer ------------------------------------------------------------------------------------------


def infer(check: Check) -> None:
    """The tiny model's logits and tokens against the CPU, then the speed of a large one."""
    folder = ModelFolder.find("tiny")
    models = {}
    for dtype in check.sizes.dtypes:
        models[dtype] = folder.load_model(dtype, "cpu"), folder.load_model(dtype, check.device)
        check.row(f"logits {dtype}", lambda d=dtype: _compare_logits(*models[d], DTYPES[d][1]))
    for dtype in check.sizes.dtypes:
        for drafts in (0, 2):
            name = f"greedy tokens {dtype}, {drafts} drafts"
            check.row(name, lambda d=dtype, k=drafts: _compare_tokens(folder, models[d], d, k))
    models.clear()
    large = _Large(check, folder)
    check.row(f"{check.sizes.infer_preset} whole, random weights", large.make)
    check.row(f"prefill {check.sizes.prompt_tokens} tokens", large.prefill)
    for streams in check.sizes.streams:
        check.row(f"decode, {streams} streams", lambda n=streams: large.decode(n))


def _prompts(folder: ModelFolder) -> list[list[int]]:
    tokenizer = folder.load_tokenizer()
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]


@torch.no_grad()
def _compare_logits(ours: DeepseekV3, theirs: DeepseekV3, bar: float) -> dict[str, Any]:
    tokens_BT = torch.randint(0, 3000, (2, 128), generator=torch.Generator().manual_seed(0))
    expected = ours(tokens_BT)
    found = theirs(tokens_BT.to(theirs.lm_head.weight.device)).cpu()
    error = _distance(found, expected)
    return {"relative_error": error, "is_good": error <= bar}


def _compare_tokens(
    folder: ModelFolder, models: tuple[DeepseekV3, DeepseekV3], dtype: str, drafts: int
) -> dict[str, Any]:
    """Float32 gives the same tokens; bfloat16 may part where two are nearly as likely."""
    params = SamplingParams(temperature=0, max_tokens=24)
    answers = []
    for model in models:
        policy = FixedDrafts(drafts)
        engine = Engine(model, folder.load_tokenizer(), speculate=drafts, draft_policy=policy)
        answers.append([out.token_ids for out in engine.generate(_prompts(folder), params)])
    same = sum(a == b for a, b in zip(*answers, strict=True))
    is_good = same == len(QUESTIONS) or dtype == "bfloat16"
    return {"same_answers": f"{same} of {len(QUESTIONS)}", "is_good": is_good}


class _Large:
    """A model with random weights that are made on the device, never on the host, and its engine.

    Its tokens mean nothing, so the tiny model's tokenizer does.
    """

    def __init__(self, check: Check, folder: ModelFolder) -> None:
        self.check, self.folder = check, folder
        self.engine: Engine | None = None

    @torch.no_grad()
    def make(self) -> dict[str, Any]:
        sizes = self.check.sizes
        self.check.memory()
        model = empty(preset(sizes.infer_preset), sizes.infer_dtype, self.check.device).eval()
        model.reset_parameters()
        self.engine = Engine(
            model,
            self.folder.load_tokenizer(),
            max_batch=max(sizes.streams),
            max_step_tokens=sizes.prompt_tokens,
            max_model_len=min(sizes.prompt_tokens * 2, model.config.max_position_embeddings),
            use_prefix_cache=False,
        )
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self._answer(1, 8, 2)  # what is made at the first use
        return {"weights_gb": round(size / 1e9, 2), **self.check.memory()}

    def prefill(self) -> dict[str, Any]:
        num = self.check.sizes.prompt_tokens
        seconds = min(self.check.seconds(lambda: self._answer(1, num, 1)) for _ in range(3))
        return {"tokens_per_second": round(num / seconds), **self.check.memory()}

    def decode(self, streams: int) -> dict[str, Any]:
        """The time of long answers less that of short ones, so that the prompts do not count."""
        num = self.check.sizes.answer_tokens
        self._answer(streams, 16, 2)
        short = self.check.seconds(lambda: self._answer(streams, 16, 1))
        long = self.check.seconds(lambda: self._answer(streams, 16, 1 + num))
        speed = streams * num / max(long - short, 1e-9)
        return {"tokens_per_second": round(speed, 1), **self.check.memory()}

    def _answer(self, streams: int, prompt_tokens: int, answer_tokens: int) -> None:
        if self.engine is None:
            raise RuntimeError("the model was not made")
        params = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        prompt = [5 + i % 1000 for i in range(prompt_tokens)]
        self.engine.generate([prompt] * streams, params)


# train ------------------------------------------------------------------------------------------


def train(check: Check) -> None:
    """Loss and gradients of one step against the CPU, a few updates, then tokens a second."""
    config = preset("tiny").with_changes(num_hidden_layers=3)
    tokens_BS = torch.randint(0, 3000, (4, 130), generator=torch.Generator().manual_seed(0))
    expected = _gradients(config, tokens_BS, torch.device("cpu"), "float32")
    for dtype in check.sizes.dtypes:
        check.row(
            f"loss and gradients {dtype}",
            lambda d=dtype: _compare_gradients(check, config, tokens_BS, d, expected),
        )
    check.row("five updates float32", lambda: _compare_updates(check, config, tokens_BS))
    for precision in check.sizes.dtypes:
        name = f"{check.sizes.train_preset}, {precision}"
        check.row(name, lambda p=precision: _training_speed(check, p))


def _gradients(
    config: ModelConfig, tokens_BS: Tensor, device: torch.device, precision: str
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients on the host) of one seed's weights."""
    model = build(config, seed=0).to(device).train()
    tokens_BS = tokens_BS.to(device)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    counts_C = target_counts(mask_BS, config.num_nextn_predict_layers)
    by = coefficients(counts_C, len(tokens_BS), STEP_VALUES.mtp_weight, STEP_VALUES.balance_alpha)
    compute_in(model, precision)
    loss = TrainingModel(model)(tokens_BS=tokens_BS, mask_BS=mask_BS, by=by).total
    loss.backward()
    found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def _compare_gradients(
    check: Check,
    config: ModelConfig,
    tokens_BS: Tensor,
    precision: str,
    expected: tuple[float, dict[str, Tensor]],
) -> dict[str, Any]:
    bar = DTYPES[precision][1]
    loss, found = _gradients(config, tokens_BS, check.device, precision)
    names = sorted(expected[1])
    joined = [torch.cat([g[name].flatten() for name in names]) for g in (found, expected[1])]
    errors = {
        "loss_error": abs(loss - expected[0]) / expected[0],
        "gradient_error": _distance(*joined),
    }
    return {**errors, **check.memory(), "is_good": all(error <= bar for error in errors.values())}


def _compare_updates(check: Check, config: ModelConfig, tokens_BS: Tensor) -> dict[str, Any]:
    """Losses of five steps, AdamW and router bias included, on the CPU and on the device."""
    losses = []
    for device in (torch.device("cpu"), check.device):
        model = build(config, seed=0).to(device).train()
        stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=2)
        tokens = tokens_BS.to(device)
        results = [stepper.step(tokens, tokens >= 0, STEP_VALUES) for _ in range(5)]
        losses.append(torch.tensor([result.loss for result in results]))
    error = _distance(losses[1], losses[0])
    is_good = error <= FLOAT32_BAR and bool(losses[1][-1] < losses[1][0])
    return {"first_loss": float(losses[1][0]), "last_loss": float(losses[1][-1]),
            "relative_error": error, "is_good": is_good}  # fmt: skip


def _training_speed(check: Check, precision: str) -> dict[str, Any]:
    sizes = check.sizes
    check.memory()
    config = preset(sizes.train_preset)
    model = empty(config, device=check.device).train()
    model.reset_parameters()
    stepper = Stepper(
        model,
        AdamW(model, OptimizerSettings()),
        micro_batch_size=max(sizes.train_batch // 2, 1),
        precision=precision,
    )
    width = sizes.train_length + 1 + config.num_nextn_predict_layers
    tokens_BS = torch.randint(0, config.vocab_size, (sizes.train_batch, width)).to(check.device)

    def steps(count: int) -> None:
        for _ in range(count):
            stepper.step(tokens_BS, tokens_BS >= 0, STEP_VALUES)

    steps(1)
    seconds = check.seconds(lambda: steps(sizes.train_steps))
    speed = sizes.train_steps * sizes.train_batch * sizes.train_length / seconds
    num_parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": num_parameters, "tokens_per_second": round(speed), **check.memory()}


# results ----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Check], None]] = {"infer": infer, "train": train}


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def _machine(device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "CPU"
    return {"device": name, "torch": torch.__version__, "day": time.strftime("%Y-%m-%d")}


def markdown(part: str, machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A table for docs/gpu.md."""
    lines = [
        f"`gpu-check PART={part}`: {machine['device']}, torch {machine['torch']}, {machine['day']}",
        "",
        "| row | state | found |",
        "|---|---|---|",
    ]
    for row in rows:
        found = ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in ("row", "state"))
        lines.append(f"| {row['row']} | {row['state']} | {found} |")
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name}={_short(value)}" for name, value in row.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse")
    parser.add_argument("--quick", action="store_true", help="a small stand-in for large models")
    parser.add_argument("--result", type=Path, help="JSON; a .md goes beside it")
    parser.add_argument("--seconds", type=float, default=200, help="no row begins after so many")
    options = parser.parse_args(arguments)
    try:
        device = resolve_device(options.device)
    except RorqualError as problem:
        print(f"gpu-check: {problem}\n  or:       rehearse with --device cpu --quick")
        return EXIT_NO_GPU
    if device.type == "cpu" and not options.quick:
        parser.error("on a CPU only --quick ends in minutes")
    result = options.result or Path("build") / f"gpu-check-{options.part}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    check = Check(options.part, device, sizes, result, options.seconds)
    check.write()
    PARTS[options.part](check)
    print(f"written: {result} and {result.with_suffix('.md')}")
    return EXIT_FAILED if any(row["state"] == "FAILED" for row in check.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
