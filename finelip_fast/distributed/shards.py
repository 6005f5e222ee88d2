"""Search over many index folders, each served by its own process on one or several machines.

    engine = open_engine("auto", checkpoint)
    with Shards(["/data/a", "/data/b"], partial="mark") as shards:
        found = shards.search(engine.embed_texts(["A red house …"]), k=10)

Every shard answers with its ``k`` best items, and these are merged by score: the result is that of one index of all items. A
process that dies is restarted and reopens its folder; meanwhile searches are refused, or answered from the other shards and
marked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from finelip_fast._arguments import folder_path, listed, one_of, seconds, whole_number
from finelip_fast.distributed.cluster import check_resources, cluster, reason_of
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, stored_index
from finelip_fast.index.catalogue import Item
from finelip_fast.index.checks import as_queries
from finelip_fast.index.search import Mode

Partial = Literal["refuse", "mark"]

# Time for all shards to open their folders at the start.
_START_SECONDS = 120.0


class ShardItem(NamedTuple):
    """A search hit: the folder of its shard, and its entry in the catalogue there."""

    shard: str
    id: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class ShardSearchResults:
    """Results of a search with ``Q`` queries, best first; ties are in the order of shards, then of insertion.

    Attributes:
        scores, global_scores: float32 ``[Q, k]``.
        fine_scores: float32 ``[Q, k]``; None for a checkpoint without trained aggregators.
        items: The hits, ``Q`` lists of ``k``.
        modes: Search mode of each shard, by its folder.
        covered: Share of all items that were searched, by the last known sizes of the missing shards; 1: all.
        missing: The shards that did not answer, and why.
    """

    scores: Tensor
    global_scores: Tensor
    fine_scores: Tensor | None
    items: list[list[ShardItem]]
    modes: dict[str, Mode]
    covered: float
    missing: dict[str, str]


class Shards:
    """Index folders of one checkpoint, searched together.

    May be used from several threads. Shards run on the Ray cluster that this process is connected to, or the one at
    ``RAY_ADDRESS``, or else on one started on this machine.

    Args:
        folders: Folders of the indexes, each once; the processes must see them under the same paths.
        partial: Behaviour if shards are missing: ``"refuse"`` raises, ``"mark"`` answers from the others and says so.
        timeout: Seconds to wait for the answers to a search.
        cpus, gpus: Resources of the cluster for each shard. With ``gpus=0`` it searches on the CPU, with ``cpus`` threads.

    Raises:
        InputError: No folder, a duplicate folder, an unknown ``partial``, or a number that is out of range.
        EngineError: Ray is not installed, does not start or cannot be reached.
        StoreError: A folder without an index, indexes of different checkpoints, or shards that do not start.
    """

    def __init__(
        self,
        folders: Sequence[str | PathLike[str]],
        *,
        partial: Partial = "refuse",
        timeout: float = 30.0,
        cpus: float = 1,
        gpus: float = 0,
    ) -> None:
        names = [str(folder_path("a folder", folder)) for folder in listed("folders", folders)]
        # The same index twice, under another spelling or by a link, too, would return each hit twice.
        if not names or len(set(map(os.path.realpath, names))) < len(names):
            raise InputError(f"expected unique folders of indexes, got {names}")
        one_of("partial", partial, get_args(Partial))
        self.partial, self.timeout = partial, seconds("timeout", timeout)
        cpus, gpus = check_resources(cpus, gpus)
        self._lock = threading.Lock()
        self._resources = ExitStack()
        try:
            self._ray = self._resources.enter_context(cluster(len(names) * cpus))
            options = {
                "max_restarts": -1,
                "max_task_retries": 0,
                "num_cpus": cpus,
                "num_gpus": gpus,
                "scheduling_strategy": "SPREAD",
            }
            make = self._ray.remote(_Server).options(**options)
            self._shards = [_Shard(self._ray, make, name, "cuda" if gpus else "cpu") for name in names]
            self._resources.callback(self._stop)
            self.spec = self._open()
        except BaseException:
            self.close()
            raise

    @property
    def folders(self) -> list[str]:
        """Folders of the shards, as given and in the same order."""
        return [shard.folder for shard in self._shards]

    def _open(self) -> IndexSpec:
        """Wait for all shards; return what their items have in common."""
        self._ray.wait(
            [waking_shard.waking for waking_shard in self._shards],
            num_returns=len(self._shards),
            timeout=_START_SECONDS,
        )
        first = self._shards[0]
        for shard in self._shards:
            if reason := shard.asleep():
                raise StoreError(f"the shard {shard.folder} cannot be opened: {reason}")
            if different := shard.differs(first.spec):
                raise StoreError(
                    f"expected shards of the same checkpoint, but {first.folder} and {shard.folder} differ in {different}"
                )
        for shard in self._shards:
            shard.expected = first.spec
        assert first.spec is not None
        return first.spec

    def __len__(self) -> int:
        """Number of items in all shards, as of their last answers."""
        return sum(shard.size for shard in self._shards)

    def search(
        self, queries: Tensor, k: int, *, alpha: float | None = None, mode: Mode = "auto", where: str | None = None
    ) -> ShardSearchResults:
        """Find the ``k`` best items for each query, over all shards.

        In the exact modes, the results are those of one index of all items in the order of the shards, with identical score
        bits. In two-stage modes, every shard chooses its own candidates, more in total than one index would.

        Args:
            queries: Embeddings ``[Q, L_q, D]``, unit rows.
            k: Number of items; fewer are returned if there are fewer.
            alpha: Weight of the global cosine; None: the spec's.
            mode: See :mod:`finelip_fast.index.search`; ``"auto"``: each shard by its own tuning.
            where: Filter on the items' metadata, see :mod:`finelip_fast.index.filters`.

        Raises:
            InputError: ``k < 1``, queries that are not such embeddings, an unknown mode, or an invalid filter.
            StoreError: With ``partial="refuse"``: shards are missing; names them.
        """
        k = whole_number("k", k)
        answers, missing = self._ask(_as_array(as_queries(queries, self.spec.width)), k, alpha, mode, where)
        if missing and self.partial == "refuse":
            reasons = "; ".join(f"{folder}: {reason}" for folder, reason in missing.items())
            raise StoreError(
                f"{len(missing)} of {len(self._shards)} shards did not answer ({reasons}); search again when they are back, "
                "or accept the results of the others with partial='mark'"
            )
        return self._merge(answers, missing, len(queries), k)

    def _ask(self, *request: Any) -> tuple[dict[str, _Answer], dict[str, str]]:
        """Collect answers, and reasons for missing ones, by folder, in the order of the shards."""
        requests: dict[Any, _Shard] = {}
        missing: dict[str, str] = {}
        with self._lock:
            for shard in self._shards:
                if reason := shard.asleep():
                    missing[shard.folder] = reason
                else:
                    requests[shard.server.search.remote(*request)] = shard
        if requests:
            self._ray.wait(list(requests), num_returns=len(requests), timeout=self.timeout)
        answers: dict[str, _Answer] = {}
        for ref, shard in requests.items():
            try:
                answers[shard.folder] = answer = self._ray.get(ref, timeout=0)
                shard.size = answer.size
            except self._ray.exceptions.GetTimeoutError:
                self._ray.cancel(ref)  # if it is still waiting for its turn
                missing[shard.folder] = f"no answer within {self.timeout:g} seconds"
            except self._ray.exceptions.RayError as error:
                if isinstance(cause := getattr(error, "cause", None), InputError):
                    raise cause from None
                missing[shard.folder] = reason_of(error)
            if shard.folder in missing:
                with self._lock:
                    shard.wake()
        return answers, {
            known_shard.folder: missing[known_shard.folder]
            for known_shard in self._shards
            if known_shard.folder in missing
        }

    def _merge(self, answers: dict[str, _Answer], missing: dict[str, str], count: int, k: int) -> ShardSearchResults:
        def joined(name: str) -> Tensor:
            empty = np.empty((count, 0), np.float32)
            return torch.from_numpy(np.concatenate([empty, *(getattr(answer, name) for answer in answers.values())], 1))

        # Stable sort, so that ties stay in the order of the shards.
        order = joined("scores").sort(dim=1, descending=True, stable=True).indices[:, :k]
        items = [
            [
                ShardItem(folder, item.id, item.metadata)
                for folder, answer in answers.items()
                for item in answer.items[query]
            ]
            for query in range(count)
        ]
        searched, total = sum(shard_answer.size for shard_answer in answers.values()), len(self)
        return ShardSearchResults(
            scores=joined("scores").gather(1, order),
            global_scores=joined("global_scores").gather(1, order),
            fine_scores=None if self.spec.is_global else joined("fine_scores").gather(1, order),
            items=[[row[at] for at in best] for row, best in zip(items, order.tolist(), strict=True)],
            modes={folder: answer.mode for folder, answer in answers.items()},
            covered=searched / total if total else float(not missing),
            missing=missing,
        )

    def _stop(self) -> None:
        for shard in self._shards:
            self._ray.kill(shard.server)

    def close(self) -> None:
        """End the processes, and Ray if it was started here."""
        self._resources.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Answer(NamedTuple):
    """One shard's answer: total, global and fine scores, each ``[Q, k]``; items; mode; number of items in the shard."""

    scores: np.ndarray[Any, Any]
    global_scores: np.ndarray[Any, Any]
    fine_scores: np.ndarray[Any, Any] | None
    items: list[list[Item]]
    mode: Mode
    size: int


class _Server:
    """The process of a shard. It opens its folder on the first request, so failure to open it is reported as an answer."""

    def __init__(self, folder: str, device: str) -> None:
        self._folder, self._device = folder, device
        self._index: Index | None = None

    def describe(self) -> tuple[IndexSpec, int]:
        index = self._opened()
        return index.spec, len(index)

    def search(
        self, queries: np.ndarray[Any, Any], k: int, alpha: float | None, mode: Mode, where: str | None
    ) -> _Answer:
        index = self._opened()
        try:
            # Copied, since arrays from Ray are read-only, about which PyTorch warns.
            result = index.search(torch.tensor(queries), k, alpha=alpha, mode=mode, where=where)
            fine_scores = None if result.fine_scores is None else result.fine_scores.numpy()
            scores, global_scores = result.scores.numpy(), result.global_scores.numpy()
            return _Answer(scores, global_scores, fine_scores, result.items, result.mode, len(index))
        except InputError:
            raise
        except Exception:
            self._index = None  # it may be intact again once reopened
            raise

    def _opened(self) -> Index:
        if self._index is None:
            self._index = stored_index(self._folder, device=self._device)
        return self._index


class _Shard:
    """The driver's view of a shard.

    Attributes:
        server: The actor; replaced if Ray has given it up.
        waking: A pending request to a server that did not answer or has just started; it is not searched until it answers.
        spec, size: Spec and number of items from its last answers.
        expected: Spec that the shard's own must agree with.
    """

    def __init__(self, ray: Any, make: Any, folder: str, device: str) -> None:
        self.folder, self._ray = folder, ray
        self._make: Callable[[], Any] = lambda: make.remote(str(Path(folder).absolute()), device)
        self.spec: IndexSpec | None = None
        self.expected: IndexSpec | None = None
        self.size = 0
        self.server = self._make()
        self.waking: Any = None
        self.wake()

    def wake(self) -> None:
        """Ask for a sign of life, unless a request is already pending."""
        if self.waking is None:
            self.waking = self.server.describe.remote()

    def asleep(self) -> str | None:
        """Say why the shard cannot be searched; None if it can. Does not wait."""
        if self.waking is None:
            return None
        try:
            self.spec, self.size = self._ray.get(self.waking, timeout=0)
        except self._ray.exceptions.GetTimeoutError:
            return "it is starting or busy, or no core is free"
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.ActorDiedError):
                self.server = self._make()
            self.waking = None
            self.wake()
            return reason_of(error)
        self.waking = None
        if different := self.differs(self.expected):
            self.wake()
            return f"it now holds another index, which differs in {different}"
        return None

    def differs(self, spec: IndexSpec | None) -> str:
        """Say how the shard's checkpoint differs from that of others; empty if it does not.

        The storage type of embeddings may differ, and so may their number of rows if only the global ones count.
        """
        if spec is None or self.spec is None:
            return ""
        free = {"dtype", "tokens"} if spec.is_global and self.spec.is_global else {"dtype"}
        ours_spec, their_spec = asdict(self.spec), asdict(spec)
        return ", ".join(
            f"{name}: {their_spec[name]!r} and {ours_spec[name]!r}"
            for name in ours_spec
            if name not in free and ours_spec[name] != their_spec[name]
        )


def _as_array(queries: Tensor) -> np.ndarray[Any, Any]:
    queries = queries.cpu()
    return (queries.float() if queries.dtype == torch.bfloat16 else queries).numpy()
