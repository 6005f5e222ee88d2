"""Find the fastest launch settings on this GPU, and keep them for every later run.

A case is one kind of launch, named by operation, dtype and sizes as in the tables (``settings.py``). Candidates are variations
of the default settings. A candidate that cannot run here or gives a wrong result is discarded; the fastest of the others is
kept. Part of each result is compared with float64, and all of it with the result of the defaults. Each case is saved as soon
as it is decided, so that an interrupted run can resume. Nothing is saved for a case during which the GPU stopped working.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tqdm import tqdm

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels import settings as _settings
from finelip_fast.kernels.atrm import gradient_triton as atrm_gradient
from finelip_fast.kernels.atrm import triton as atrm
from finelip_fast.kernels.atrm.formula import AtrmInputs, atrm_reference
from finelip_fast.kernels.atrm.parts_triton import capability_of
from finelip_fast.kernels.clim import gradient as plain_gradient
from finelip_fast.kernels.clim import gradient_triton as clim_gradient
from finelip_fast.kernels.clim import launches
from finelip_fast.kernels.clim import triton as clim
from finelip_fast.kernels.clim.formula import clim_reference, scaled_rows
from finelip_fast.kernels.clim.quantize import quantize

OPERATIONS = ("clim", "clim_gradient", "atrm", "atrm_gradient")

# Sizes of ViT-B/16 and ViT-L/14: D, L = K + 1, patches.
SHAPES = ((512, 40, 196), (768, 52, 256))

# Largest number of items in a timed search; fewer if memory is short.
_ITEMS = 100_000
_SHARE_OF_MEMORY = 0.4
# Size of both sides of a timed training step, and of a timed aggregation.
_BATCH = 512
# Items that are created at once.
_AT_ONCE = 5_000
# Errors relative to the largest number: float32 sums of exact products; results and operands in float16.
_SCORE_ERROR, _HALF_ERROR = 1e-5, 5e-3
# Share of winners that may differ, because their maxima almost tie.
_WINNERS = 1e-3
# Items at each end of a result that are compared with float64.
_CHECKED = 64

Results = tuple[Tensor, ...]
Run = Callable[[Any], Results]  # takes settings


class Prepared(NamedTuple):
    """A launch to time, and the values to check its results against.

    Attributes:
        run: The launch.
        exact: Places in the first results, in order, and the float64 values there.
        tolerance: Largest error, relative to the largest number.
    """

    run: Run
    exact: tuple[tuple[Any, Tensor], ...]
    tolerance: float

    def is_right(self, results: Results, defaults: Results) -> bool:
        """Whether the results match float64 where it is known, and those of the default settings everywhere."""
        exact = [(result[at], part) for result, (at, part) in zip(results, self.exact, strict=False)]
        pairs = [*exact, *zip(results, defaults, strict=True)]
        return all(self._agree(result, expected) for result, expected in pairs)

    def _agree(self, result: Tensor, expected: Tensor) -> bool:
        if not result.is_floating_point():
            return bool((result != expected).double().mean() <= _WINNERS)
        error = (result.to(expected.dtype) - expected).abs().max()
        return bool(error <= self.tolerance * expected.abs().max())  # False for NaN


@dataclass(frozen=True)
class Case:
    """A kind of launch.

    Args:
        names: Keys in the table; dtypes that the hardware treats alike share their settings.
        default: Settings without tuning.
        candidates: Other settings to try.
        prepare: Function that creates the inputs and returns the launch to time and compare.
    """

    names: tuple[str, ...]
    default: Any
    candidates: tuple[Any, ...]
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Tuned:
    """Result of a case: the settings kept, their speedup over the defaults, and the number of candidates discarded."""

    name: str
    settings: Any
    speedup: float
    failed: int


class Measure(Protocol):
    """Function that returns the median time of a call in milliseconds."""

    def __call__(self, run: Callable[[], Any]) -> float: ...


def tune(
    cases: Sequence[Case],
    *,
    measure: Measure | None = None,
    again: bool = False,
    seconds: float | None = None,
    settings: Path | None = None,
    progress: bool = True,
) -> list[Tuned]:
    """Tune the cases in order.

    Args:
        cases: Cases from :func:`cases_for`.
        measure: Function that times a call; None means ``triton.testing.do_bench``, which clears the L2 cache before each.
        again: Whether to tune cases that are already in the table.
        seconds: Time after which no further case is started; None means no limit.
        settings: File of settings to write; None means this machine's own.

    Returns:
        Results of the cases that were tuned, without those that were skipped.

    Raises:
        KernelError: The default settings give wrong results on this GPU, or no longer give right ones after a candidate
            failed. Cases decided before are saved.
    """
    measure = measure or _do_bench
    known = _settings.names(settings)
    measured = []
    end = float("inf") if seconds is None else time.monotonic() + seconds
    with tqdm(cases, disable=not progress, unit="case") as bar:
        for case in bar:
            if time.monotonic() >= end:
                break
            bar.set_postfix_str(case.names[0])
            if again or not known.issuperset(case.names):
                tuned = _best(case, measure)
                _settings.save(dict.fromkeys(case.names, asdict(tuned.settings)), settings)
                measured.append(tuned)
    return measured


def _best(case: Case, measure: Measure) -> Tuned:
    prepared = case.prepare()
    defaults = prepared.run(case.default)
    if not prepared.is_right(defaults, defaults):
        raise KernelError(
            f"{case.names[0]}: expected results within {prepared.tolerance:g} of float64, but those of the default settings"
            " differ more on this GPU; FINELIP_KERNELS=reference computes without the fused kernels"
        )
    times = {case.default: measure(partial(prepared.run, case.default))}
    failed = 0
    for candidate in case.candidates:
        try:
            right = prepared.is_right(prepared.run(candidate), defaults)
            times[candidate] = measure(partial(prepared.run, candidate)) if right else float("inf")
        except Exception as error:  # does not compile, or needs too much memory: Triton has many names for it
            _check_alive(case, prepared, defaults, candidate, error)
            times[candidate] = float("inf")
        failed += times[candidate] == float("inf")
    best = min(times, key=times.__getitem__)
    return Tuned(case.names[0], best, times[case.default] / times[best], failed)


def _check_alive(case: Case, prepared: Prepared, defaults: Results, candidate: Any, error: Exception) -> None:
    """Check that the GPU still works: after an illegal access, every later candidate in this process would fail."""
    try:
        alive = prepared.is_right(prepared.run(case.default), defaults)
    except Exception:
        alive = False
    if not alive:
        raise KernelError(
            f"{case.names[0]}: after {candidate} failed, the default settings fail on this GPU, too ({error}); nothing is"
            " saved for this case: tune in a new process, with other --operations first"
        ) from error


def _do_bench(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return cast(float, do_bench(run, warmup=5, rep=30, return_mode="median"))


# Cases ---------------------------------------------------------------------------------------------------------------


def cases_for(operations: Sequence[str] = OPERATIONS, *, device: int = 0) -> list[Case]:
    """Cases to tune on a GPU, starting with those that most searches use.

    Raises:
        InputError: An unknown operation.
    """
    unknown = sorted(set(operations) - set(OPERATIONS))
    if unknown:
        raise InputError(f"expected operations of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    makers = (_clim_cases, _clim_gradient_cases, _atrm_cases, _atrm_gradient_cases)
    cuda = torch.device("cuda", device)
    return [case for name, make in zip(OPERATIONS, makers, strict=True) if name in operations for case in make(cuda)]


def _clim_cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float16, torch.int8):
        for width, tokens, _ in SHAPES:
            for n_queries in (1, 8, 64):
                launch = launches.Launch(capability_of(device), dtype, width, n_queries, tokens)
                default = launches.default_settings(**launch._asdict())
                yield _case(launch, default, _clim_candidates(launch, default), partial(_search, launch, device))


def _clim_candidates(launch: launches.Launch, default: launches.ClimSettings) -> Iterator[launches.ClimSettings]:
    narrow, whole_width = 128 // launch.dtype.itemsize, int(triton.next_power_of_2(launch.width))
    cuts = (  # items, warps, piece of D, stages
        (64, 4, narrow, 4),
        (128, 4, narrow, 3),
        (128, 4, narrow, 4),
        (128, 8, narrow, 3),
        (128, 8, narrow, 4),
        (256, 8, narrow, 3),
        (128, 4, 2 * narrow, 3),
        (128, 8, 2 * narrow, 2),
        (64, 4, 4 * narrow, 3),
        (128, 8, 4 * narrow, 2),
        (64, 4, whole_width, 2),
        (64, 8, whole_width, 2),
        (64, 4, whole_width, 4),
        (128, 8, whole_width, 2),
        (128, 8, whole_width, 3),
    )
    # With more queries per program, items are read less often, but fewer registers are left: the default on some GPUs only.
    most_queries = max(1, min(launch.n_queries, 128 // launches.query_columns(launch.query_tokens)))
    for queries, (items, warps, block_width, stages) in product(
        dict.fromkeys((default.queries_per_program, most_queries)), cuts
    ):
        settings = launches.ClimSettings(items, queries, min(whole_width, block_width), warps, stages)
        if launches.fits(settings, launch):
            yield settings
            if queries == default.queries_per_program and launches.describes(settings, launch.capability, launch.width):
                yield replace(settings, descriptor=True)


def _search(launch: launches.Launch, device: torch.device) -> Prepared:
    queries = _unit_rows(launch.n_queries, launch.query_tokens, launch.width, device)
    items = _unit_rows(_items_that_fit(device, launch), launch.query_tokens, launch.width, device)
    ends = _ends(items)
    scales = item_scales = None
    if launch.dtype == torch.int8:
        queries, scales = quantize(queries)
        items, item_scales = map(torch.cat, zip(*map(quantize, items.split(_AT_ONCE)), strict=True))
    exact = clim_reference(
        scaled_rows(queries, scales),
        scaled_rows(items[ends], None if item_scales is None else item_scales[ends]),
        0.8,
        dtype=torch.float64,
    )

    def run(settings: Any) -> Results:
        return (
            clim.scores(queries, items, alpha=0.8, query_scales=scales, item_scales=item_scales, settings=settings),
        )

    return Prepared(run, (((slice(None), ends), exact),), _SCORE_ERROR)


def _clim_gradient_cases(device: torch.device) -> Iterator[Case]:
    for width, tokens, _ in SHAPES:
        scores = launches.Launch(capability_of(device), torch.float16, width, _BATCH, tokens, winners=True)
        default = launches.default_settings(**scores._asdict())
        yield _case(scores, default, _clim_candidates(scores, default), partial(_scores_with_winners, scores, device))
        launch = clim_gradient.Launch(capability_of(device), torch.float16, width, tokens)
        cut = clim_gradient.default_settings(**launch._asdict())
        candidates = (
            clim_gradient.ClimGradientSettings(sets, block_width, num_warps, num_stages)
            for sets in (1, 2)
            for block_width in (64, 128, 256)
            for num_warps in (4, 8)
            for num_stages in (2, 3)
        )
        yield _case(launch, cut, candidates, partial(_gradient, launch, device))


def _scores_with_winners(launch: launches.Launch, device: torch.device) -> Prepared:
    queries, items = (_unit_rows(_BATCH, launch.query_tokens, launch.width, device) for _ in range(2))
    ends = _ends(items)
    exact = clim_reference(queries[ends], items[ends], 0.8, dtype=torch.float64)
    run = partial(clim_gradient.scores_with_winners, queries, items, alpha=0.8)
    return Prepared(lambda settings: run(settings=settings), (((ends[:, None], ends[None, :]), exact),), _SCORE_ERROR)


def _gradient(launch: clim_gradient.Launch, device: torch.device) -> Prepared:
    queries, items = (_unit_rows(_BATCH, launch.tokens, launch.width, device) for _ in range(2))
    grad, *winners = clim_gradient.scores_with_winners(queries, items, alpha=0.8)
    ends = _ends(items)
    # From the same winners, because float64 has others where maxima almost tie.
    of_queries, _ = plain_gradient.gradient(
        grad[ends], queries[ends].float(), items.float(), *(winner[ends] for winner in winners), alpha=0.8
    )
    _, of_items = plain_gradient.gradient(
        grad[:, ends], queries.float(), items[ends].float(), *(winner[:, ends] for winner in winners), alpha=0.8
    )
    run = partial(clim_gradient.gradient, grad, queries, items, *winners, alpha=0.8)
    return Prepared(lambda settings: run(settings=settings), ((ends, of_queries), (ends, of_items)), _HALF_ERROR)


def _atrm_cases(device: torch.device) -> Iterator[Case]:
    for width, rows, patches in SHAPES:
        for items in (1024, 1):
            launch = atrm.Launch(capability_of(device), width, rows - 1, torch.float16, items)
            default = atrm.default_settings(**launch._asdict())
            first = (
                replace(default, logits_tokens=tokens, logits_width=columns, logits_warps=warps)
                for tokens in (32, 64, 128)
                for columns in (32, 64)
                for warps in (4, 8)
            )
            second = (
                replace(default, pool_rows=pooled, pool_tokens=tokens, pool_warps=warps)
                for pooled in (16, 32)
                for tokens in (32, 64)
                for warps in (4, 8)
            )
            yield _case(launch, default, chain(first, second), partial(_aggregate, launch, patches, device))


def _aggregate(launch: atrm.Launch, patches: int, device: torch.device) -> Prepared:
    inputs = _aggregation(launch.items, patches, launch.width, launch.aggregated, device)
    ends = _ends(inputs.x)
    exact = atrm_reference(_exact_inputs(inputs, ends), dtype=torch.float64)
    return Prepared(lambda settings: (atrm.aggregate(inputs, settings=settings),), ((ends, exact),), _HALF_ERROR)


def _atrm_gradient_cases(device: torch.device) -> Iterator[Case]:
    for width, rows, patches in SHAPES:
        launch = atrm_gradient.Launch(capability_of(device), width, rows - 1)
        default = atrm_gradient.default_settings(**launch._asdict())
        first = (
            replace(default, row_tokens=tokens, row_warps=warps, row_stages=stages)
            for tokens in (16, 32)
            for warps in (4, 8)
            for stages in (2, 3)
        )
        second = (
            replace(default, token_tokens=tokens, token_width=columns, token_warps=warps)
            for tokens in (32, 64)
            for columns in (32, 64)
            for warps in (4, 8)
        )
        yield _case(launch, default, chain(first, second), partial(_aggregate_gradient, launch, patches, device))


def _aggregate_gradient(launch: atrm_gradient.Launch, patches: int, device: torch.device) -> Prepared:
    inputs = _aggregation(_BATCH, patches, launch.width, launch.aggregated, device)
    grad = torch.randn(_BATCH, launch.aggregated + 1, launch.width, device=device).half()
    ends = _ends(inputs.x)
    part = _exact_inputs(inputs, ends)
    x = part.x.requires_grad_()
    (exact,) = torch.autograd.grad(atrm_reference(part, dtype=torch.float64), x, grad[ends].double())

    def run(settings: Any) -> Results:
        of_x, _, _, of_w1, _, of_w2, *_ = atrm_gradient.gradient(grad, inputs, settings=settings)
        return of_x, of_w1, of_w2

    return Prepared(run, ((ends, exact),), _HALF_ERROR)


def _case(launch: Any, default: Any, candidates: Iterable[Any], prepare: Callable[[], Prepared]) -> Case:
    # float16 and bfloat16 run at the same speed on every GPU that has both.
    alike = {launch.case, launch.case.replace(" float16 ", " bfloat16 ")}
    return Case(tuple(sorted(alike)), default, tuple(dict.fromkeys(candidates)), prepare)


def _items_that_fit(device: torch.device, launch: Any) -> int:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    item_bytes = 4 * launch.query_tokens * launch.width  # float16, and the additional memory of quantising
    return max(1, min(_ITEMS, int(_SHARE_OF_MEMORY * free) // int(item_bytes)))


def _ends(rows: Tensor) -> Tensor:
    """Indices of the first and the last items."""
    numbers = torch.arange(len(rows), device=rows.device)
    return torch.cat([numbers[:_CHECKED], numbers[_CHECKED:][-_CHECKED:]])


def _unit_rows(count: int, tokens: int, width: int, device: torch.device) -> Tensor:
    parts = [
        F.normalize(torch.randn(min(_AT_ONCE, count - first), tokens, width, device=device), dim=-1).half()
        for first in range(0, count, _AT_ONCE)
    ]
    return torch.cat(parts)


def _aggregation(items: int, tokens: int, width: int, aggregated: int, device: torch.device) -> AtrmInputs:
    """Arguments of token aggregation in float16, with every item at full length."""
    hidden = width // 5

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).half()

    return AtrmInputs(
        draw(items, tokens, width),
        1 + draw(width, scale=0.1),
        draw(width, scale=0.1),
        draw(hidden, width, scale=width**-0.5),
        draw(hidden, scale=0.1),
        draw(aggregated, hidden, scale=hidden**-0.5),
        draw(aggregated, scale=0.1),
        torch.ones((), device=device),
        None,
        draw(items, width),
    )


def _exact_inputs(inputs: AtrmInputs, items: Tensor) -> AtrmInputs:
    """Inputs of some items in float64."""
    return AtrmInputs._make(
        None if tensor is None else tensor.double()
        for tensor in inputs._replace(x=inputs.x[items], anchor=inputs.anchor[items])
    )
