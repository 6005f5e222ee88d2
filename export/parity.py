"""The parity gate: no exported file is released before it has reproduced the model's own embeddings.

The standard is the PyTorch model in float32 on the CPU. :class:`Reference` holds its embeddings of a fixed set of inputs, and
:func:`prove` compares exported encoders with them:

- files: names, axes and element types of every graph; every weight in it is one of the checkpoint's;
- values: largest and mean error, and cosine of every row, for batches of 1, 7 and 64, texts of 3, 77, 128 and all positions,
  and captions of every length from only padding to exactly full;
- company: the same item gives the same embedding twice in a batch, alone, and with any padding;
- ranking: on held-out pairs, how often the best hit is the same, and how recall@1 changes.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor
from tqdm import tqdm

from finelip_fast.config import FineLIPConfig
from finelip_fast.datasets import open_dataset
from finelip_fast.encoders import caption_lengths
from finelip_fast.errors import FineLIPError, InputError
from finelip_fast.export import inspection
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import recall
from finelip_fast.model import FineLIP
from finelip_fast.runtimes.graph import interface_problems
from finelip_fast.tokenizer import encode_batch, expected_truncation

DATA = "scenes:test:200"
REPORTS = ("parity.json", "parity.md")
BATCHES = (1, 7, 64)
LENGTHS = (3, 77, 128)  # and the full context


class Limits(NamedTuple):
    """Limits on what a precision may lose.

    Attributes:
        largest, mean: Error of an embedding's entries.
        cosine: Smallest cosine of a row with the model's.
        company: Difference between embeddings of the same item in different batches or with different padding.
        agreement: Share of queries, both directions, with the same best item.
        recall: Change of recall@1, both directions.
    """

    largest: float
    mean: float
    cosine: float
    company: float
    agreement: float
    recall: float


LIMITS = {
    "fp32": Limits(largest=5e-5, mean=2e-6, cosine=0.99999, company=1e-5, agreement=0.995, recall=0.0),
    "fp16": Limits(largest=5e-3, mean=2e-4, cosine=0.9999, company=2e-3, agreement=0.98, recall=0.01),
    "bf16": Limits(largest=3e-2, mean=2e-3, cosine=0.998, company=1e-2, agreement=0.95, recall=0.02),
    "int8": Limits(largest=5e-2, mean=5e-3, cosine=0.99, company=2e-2, agreement=0.9, recall=0.02),
    "int8-calibrated": Limits(largest=1e-1, mean=1e-2, cosine=0.98, company=4e-2, agreement=0.85, recall=0.03),
}

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Encoders:
    """Exported encoders to prove.

    Args:
        image: Function from pixels ``[B, 3, S, S]`` to embeddings.
        text: Function from ids ``[B, T]`` to embeddings.
        extras: Other exported functions: ``"image_uint8"`` of pixels ``[B, S, S, 3]``, ``"scorer"`` of two sets of embeddings.
        graphs: Graphs of those that are ONNX, by name.
    """

    image: Encode
    text: Encode
    extras: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    graphs: Mapping[str, ModelProto] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Result of one check: the value measured, its limit, and what is wrong in words."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        measured = "" if self.value is None else f" ({self.value:.3g}, limit {self.limit:.3g})"
        return f"{self.name}: {self.detail}{measured}"


@dataclass(frozen=True)
class Case:
    """Errors of one batch: ``length`` is 0 for pictures."""

    name: str
    batch: int
    length: int
    largest: float
    mean: float
    cosine: float


class Reference:
    """The model's own embeddings, computed once for all precisions.

    Args:
        model: Model in float32 on the CPU.
        pairs: Held-out pairs of pictures and captions, as :func:`finelip_fast.datasets.open_dataset` takes them.
        progress: Whether to show progress bars.

    Raises:
        InputError: Fewer than two pairs, or a data set that does not exist.
    """

    def __init__(self, model: FineLIP, pairs: str = DATA, *, progress: bool = True) -> None:
        self.model, self.source, self.progress = model, pairs, progress
        examples = open_dataset(pairs, image_size=model.config.image_size)
        if len(examples) < 2:
            raise InputError(f"expected at least two held-out pairs, got {len(examples)} in {pairs}")
        self._examples = [examples[index] for index in range(len(examples))]
        context = model.config.context_length
        with expected_truncation():
            self.captions = encode_batch(
                [example.caption for example in self._examples], context, tokenizer=model.tokenizer
            ).ids
        self.lengths = sorted({min(length, context) for length in (*LENGTHS, context)})

    @cached_property
    def pixels(self) -> Tensor:
        """Held-out pictures ``[N, 3, S, S]``."""
        return self.model.preprocess.batch([example.image for example in self._examples])

    @cached_property
    def images(self) -> Tensor:
        """Embeddings ``[N, L, D]`` of the held-out pictures."""
        return self.encode(self.model.encode_image, self.pixels, "model: pictures")

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings ``[N, L, D]`` of the held-out captions."""
        return self.encode(self.model.encode_text, self.captions, "model: captions")

    @cached_property
    def full(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Sets of 64 captions of exactly the same length in positions, and their embeddings, by that length."""
        outputs = {}
        for length in self.lengths:
            ids = torch.stack([self._of_length(length, start) for start in range(max(BATCHES))])
            outputs[length] = ids, self.encode(self.model.encode_text, ids, f"model: {length} positions")
        return outputs

    @cached_property
    def every_length(self) -> list[tuple[Tensor, Tensor]]:
        """Captions of every length from 0 (only padding) to the full context, a few in each batch, and their embeddings."""
        context = self.model.config.context_length
        outputs = []
        for first in range(0, context + 1, 16):
            lengths = range(first, min(first + 16, context + 1))
            ids = torch.zeros(len(lengths), lengths[-1], dtype=torch.int64)
            for row, length in zip(ids, lengths, strict=True):
                row[:length] = self._of_length(length, length)
            outputs.append((ids, self.encode(self.model.encode_text, ids, "")))
        return outputs

    def encode(self, encode: Encode, batch: Tensor, description: str) -> Tensor:
        """Encode a long batch in parts, with a progress bar; float32 on the CPU."""
        parts = batch.split(max(BATCHES))
        bar = tqdm(parts, desc=description, unit="batch", disable=not self.progress or len(parts) < 2, leave=False)
        with torch.inference_mode():
            return torch.cat([encode(part).float().cpu() for part in bar])

    def _of_length(self, length: int, start: int) -> Tensor:
        """Ids ``[length]``: words of the held-out captions from a given start, between start and end token."""
        before, end = torch.tensor(self.model.tokenizer.start, dtype=torch.int64), self.model.config.end_token
        stream = self.captions[self.captions > 0]
        words = stream[~torch.isin(stream, torch.tensor([*before.tolist(), end]))]
        words = words.roll(-7 * start) if len(words) else torch.arange(1, 100)  # captions may be empty
        ids = torch.cat([before, words.repeat(1 + length // len(words))])[:length]
        if length:
            ids[-1] = end
        return ids


@dataclass
class Report:
    """Findings of the gate.

    Attributes:
        precision: The row of :data:`LIMITS` that was used.
        checks: All checks, in order.
        cases: Errors batch by batch.
        facts: Machine and data of the measurement.
    """

    precision: str
    checks: list[Check] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    facts: dict[str, str | float] = field(default_factory=dict)

    def also(self, addition: Report) -> Report:
        """Merge this report with another, whose lines go under the name of what it ran on."""
        where = addition.facts["on"]
        checks = [replace(check, name=f"{where}: {check.name}") for check in addition.checks]
        cases = [replace(case, name=f"{where}: {case.name}") for case in addition.cases]
        facts = {**self.facts, "on": f"{self.facts['on']}, {where}"}
        return Report(self.precision, self.checks + checks, self.cases + cases, facts)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """Descriptions of what is wrong, one for each failed check."""
        return [str(check) for check in self.checks if not check.passed]

    def summary(self) -> dict[str, object]:
        """Summary that a manifest keeps."""
        measured = {check.name: check.value for check in self.checks if check.value is not None}
        return {"passed": self.passed, **self.facts, **measured}

    def write(self, folder: Path) -> None:
        """Write the files of :data:`REPORTS` into a folder."""
        values = {
            "precision": self.precision,
            "passed": self.passed,
            "facts": self.facts,
            "limits": LIMITS[self.precision]._asdict(),
            "checks": [vars(check) for check in self.checks],
            "cases": [vars(case) for case in self.cases],
        }
        as_json, as_table = (folder / name for name in REPORTS)
        as_json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        as_table.write_text(str(self), encoding="utf-8")

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        lines = [f"# Parity, {self.precision}: {'passed' if self.passed else 'REFUSED'}\n", f"{facts}\n"]
        lines += ["|check||found|limit|", "|---|---|---|---|"]
        for check in self.checks:
            numbers = ["" if number is None else f"{number:.3g}" for number in (check.value, check.limit)]
            lines.append(f"|{check.name}|{'ok' if check.passed else 'FAILED'}: {check.detail}|{'|'.join(numbers)}|")
        lines += ["\n|batch|positions|largest error|mean error|least cosine|", "|---|---|---|---|---|"]
        for case in self.cases:
            where = f"{case.name}, {case.batch}|{case.length or ''}"
            lines.append(f"|{where}|{case.largest:.2e}|{case.mean:.2e}|{case.cosine:.7f}|")
        return "\n".join(lines) + "\n"


def prove(reference: Reference, encoders: Encoders, precision: str, *, on: str = "CPU") -> Report:
    """Run all checks on exported encoders.

    Args:
        reference: The model's own embeddings.
        encoders: Encoders to check.
        precision: Row of :data:`LIMITS` to apply.
        on: Name of what they run on, for the report.

    Returns:
        The report; checks that make no sense after an earlier failure are skipped.
    """
    report = Report(precision)
    started = time.perf_counter()
    gate = _Gate(reference, encoders, LIMITS[precision], report)
    stages = (gate.files, gate.pictures, gate.captions, gate.extras, gate.ranking)
    try:
        for stage in stages:
            stage()
            if not all(check.passed for check in report.checks):
                break
    except FineLIPError as error:
        report.checks.append(Check("runs", False, str(error)))
    report.facts |= {
        "pairs": reference.source,
        "on": on,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return report


class _Gate:
    def __init__(self, reference: Reference, encoders: Encoders, limits: Limits, report: Report) -> None:
        self.reference, self.encoders, self.limits, self.report = reference, encoders, limits, report
        self.held_out: list[Tensor] = []  # exported embeddings of the pictures and of the captions

    def files(self) -> None:
        for name, graph in self.encoders.graphs.items():
            wrong = interface_problems(graph, name, self.reference.model.config)
            self._say(f"{name}: interface", not wrong, "; ".join(wrong) or "names, axes and types")
        for name, graph in self.encoders.graphs.items():
            if name != "scorer":
                count, wrong = inspection.weight_problems(graph, self.reference.model)
                self._say(f"{name}: weights", not wrong, "; ".join(wrong) or f"{count} constants are the checkpoint's")

    def pictures(self) -> None:
        reference = self.reference
        pixels, expected = reference.pixels, reference.images
        answer_of_all = reference.encode(self.encoders.image, pixels, "export: pictures")
        self.held_out.append(answer_of_all)
        batches = [self._encode(self.encoders.image, pixels[:size]) for size in BATCHES]
        answers = [expected[:size] for size in BATCHES]
        for size, pixels_of_size, answer in zip(BATCHES, batches, answers, strict=True):
            self._case("image", size, 0, pixels_of_size, answer)
        if not self._values("image", [*batches, answer_of_all], [*answers, expected]):
            return
        singles = torch.cat([self._encode(self.encoders.image, pixels[n : n + 1]) for n in range(min(3, len(pixels)))])
        twice = self._encode(self.encoders.image, pixels[:2].repeat(4, 1, 1, 1))
        self._company("image", [singles - answer_of_all[: len(singles)]], twice)

    def captions(self) -> None:
        reference, encode = self.reference, self.encoders.text
        pairs = [(self._encode(encode, ids), expected) for ids, expected in reference.every_length]
        outputs, expected = [pair_output for pair_output, _ in pairs], [pair_output for _, pair_output in pairs]
        shifted = []
        for length, (ids, answers) in reference.full.items():
            for size in BATCHES:
                prefix = self._encode(encode, ids[:size])
                self._case("text", size, length, prefix, answers[:size])
                outputs.append(prefix)
                expected.append(answers[:size])
        full_length = reference.encode(encode, reference.captions, "export: captions")
        self.held_out.append(full_length)
        reason = self._end_token_reason([pair_output for pair_output, _ in pairs])
        if not self._values("text", [*outputs, full_length], [*expected, reference.texts], reason):
            return
        context = reference.model.config.context_length
        for (ids, _), (together, _) in zip(reference.every_length, pairs, strict=True):
            width = ids.shape[1]
            shifted.append(self._encode(encode, ids[-1:]) - together[-1:])  # exactly full
            shifted.append(self._encode(encode, F.pad(ids[-1:], (0, context - width))) - together[-1:])
        ids, together = reference.every_length[0][0], pairs[0][0]
        for length in (1, 2):
            shifted.append(self._encode(encode, ids[length : length + 1, :length]) - together[length : length + 1])
        lengths = caption_lengths(reference.captions, reference.model.config.end_token)
        for row in range(min(3, len(full_length))):
            alone = self._encode(encode, reference.captions[row : row + 1, : int(lengths[row])])
            shifted.append(alone - full_length[row : row + 1])
        twice = self._encode(encode, reference.captions[:2].repeat(4, 1))
        self._company("text", shifted, twice)

    def extras(self) -> None:
        reference, config = self.reference, self.reference.model.config
        for name, run in self.encoders.extras.items():
            if name == "image_uint8":
                answers = run(levels(reference.pixels[:7], config))
                self._values(name, [answers.cpu()], [reference.images[:7]])
            else:
                scores = run(reference.texts[:7], reference.images).cpu()
                expected = clim_scores(reference.texts[:7], reference.images, alpha=reference.model.alpha)
                error = (scores - expected).abs().max().item()
                self._say(f"{name}: scores", error <= 1e-5, "largest error", error, 1e-5)

    def ranking(self) -> None:
        reference = self.reference
        exact = clim_scores(reference.images, reference.texts, alpha=reference.model.alpha)
        scores = clim_scores(*self.held_out, alpha=reference.model.alpha)
        same_best = torch.cat([(exact.argmax(dim) == scores.argmax(dim)).double() for dim in (0, 1)]).mean().item()
        self._say(
            "ranking: same best", same_best >= self.limits.agreement, "of queries", same_best, self.limits.agreement
        )
        before, after = recall(exact, (1,)), recall(scores, (1,))
        change = max(abs(after[name] - before[name]) for name in before)
        changes = ", ".join(f"{name} {before[name]:.3f} to {after[name]:.3f}" for name in before)
        self._say("ranking: recall@1", change <= self.limits.recall, changes, change, self.limits.recall)

    def _encode(self, encode: Encode, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return encode(batch).float().cpu()

    def _case(self, name: str, batch: int, length: int, output: Tensor, expected: Tensor) -> None:
        error = (output - expected).abs()
        case = Case(name, batch, length, error.max().item(), error.mean().item(), _cosine(output, expected))
        self.report.cases.append(case)

    def _values(self, name: str, outputs: list[Tensor], expected: list[Tensor], reason: str = "") -> bool:
        """Compare embeddings, and return whether they are within the limits."""
        rows, expected_rows = (torch.cat([batch.flatten(0, 1) for batch in ones]) for ones in (outputs, expected))
        broken = int((~rows.isfinite()).any(dim=1).sum())
        if broken:
            text = f"{broken} of {len(rows)} rows hold NaN or infinity: a number exceeds the range of the precision"
            self._say(f"{name}: finite", False, text)
            return False
        error, limits = (rows - expected_rows).abs(), self.limits
        largest, mean, cosine = error.max().item(), error.mean().item(), _cosine(rows, expected_rows)
        self._say(
            f"{name}: largest error", largest <= limits.largest, reason or "of any entry", largest, limits.largest
        )
        self._say(f"{name}: mean error", mean <= limits.mean, reason or "of all entries", mean, limits.mean)
        self._say(f"{name}: least cosine", cosine >= limits.cosine, reason or "of a row", cosine, limits.cosine)
        return all(check.passed for check in self.report.checks)

    def _company(self, name: str, differences: list[Tensor], twice: Tensor) -> None:
        limit = self.limits.company
        value = max(difference.abs().max().item() for difference in differences)
        self._say(f"{name}: company", value <= limit, "alone and in a batch, at any padding", value, limit)
        value = max((twice[0::2] - twice[0]).abs().max().item(), (twice[1::2] - twice[1]).abs().max().item())
        self._say(f"{name}: identical rows", value <= limit, "the same item four times in a batch", value, limit)

    def _end_token_reason(self, outputs: list[Tensor]) -> str:
        """Describe the position that row 0 of captions comes from, if it is not the end token."""
        middle = len(outputs) // 2  # captions followed by some padding
        ids, model = self.reference.every_length[middle][0], self.reference.model
        with torch.inference_mode():
            features = F.normalize(model.text(ids), dim=-1)
        positions = (features @ outputs[middle][:, 0, :, None]).squeeze(-1).argmax(dim=1)
        ends = caption_lengths(ids, model.config.end_token) - 1
        offset = int((positions - ends).mode().values)
        side = "after" if offset > 0 else "before"
        return f"row 0 comes from {abs(offset)} position(s) {side} the end token" if offset else ""

    def _say(
        self, name: str, passed: bool, detail: str, value: float | None = None, limit: float | None = None
    ) -> None:
        self.report.checks.append(Check(name, passed, detail, value, limit))


def _cosine(output: Tensor, expected: Tensor) -> float:
    """Smallest cosine of rows with those expected; a row of zeros agrees only with a row of zeros."""
    output, expected = output.flatten(0, -2).double(), expected.flatten(0, -2).double()
    both_zero = (output.norm(dim=-1) == 0) & (expected.norm(dim=-1) == 0)
    return float(F.cosine_similarity(output, expected, dim=-1).masked_fill(both_zero, 1.0).min())


def levels(pixels: Tensor, config: FineLIPConfig) -> Tensor:
    """Convert normalised pixels ``[B, 3, S, S]`` back to the picture's own, uint8 ``[B, S, S, 3]``."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (config.image_mean, config.image_std))
    return ((pixels * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
