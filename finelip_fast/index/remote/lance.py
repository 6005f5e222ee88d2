"""A collection on object storage: a Lance table as the system of record, and index folders as searchable copies of it.

A row is an item: ``id`` text, ``metadata`` JSON, ``tokens`` float16 ``[L * D]`` as a fixed-size list, and the CRC-32 checksums
``crc`` of the embedding's bytes, as in an index folder, and ``metadata_crc`` of id, ``crc`` and JSON (of the JSON alone in
stores of format 1). Any program that reads Lance can read it. The store is as durable as its storage: object stores keep what
they have acknowledged, but on local disks Lance does not wait for the disk, so a power failure may lose acknowledged changes.
Damage to the values of a row is an error; damage to Lance's own files may end the process, in Lance's code.

A search takes about 1 GiB of memory, however large the collection is; :mod:`finelip_fast.index.remote.sync` fills folders
from a store and a store from folders.

Lance runs threads, which a fork does not copy: processes that use a store must start others by spawn or forkserver.
"""

from __future__ import annotations

import json
import os
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finelip_fast._arguments import as_embeddings, listed, matrices
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index.arrays import checksums
from finelip_fast.index.catalogue import Catalogue, Item
from finelip_fast.index.checks import as_json, as_queries, check_ids, id_conflict, missing
from finelip_fast.index.reader import spec_differences
from finelip_fast.index.remote.rows import Batch, Keys, refuse_damaged
from finelip_fast.index.remote.tables import (
    SPEC,
    errors_of_lance,
    find_dataset,
    lance_module,
    reading,
    reason_of,
    schema_of,
    spec_of,
)
from finelip_fast.index.searching import SearchResults
from finelip_fast.index.spec import IndexSpec
from finelip_fast.kernels import clim_scores, clim_topk

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = 2
_FORMAT_OF_OLD = 1  # its checksums do not cover the ids
_COLUMNS = ["id", "metadata", "crc", "metadata_crc", "tokens"]
# Limits of one change of a store or a folder: it fits in memory, and an interrupted run continues after it.
_CHANGE = 1 << 28  # bytes of embeddings
_ROWS = 8192  # of a change, and of keys at a time
_SCAN = 1 << 26  # bytes of embeddings that a search or an iteration reads at a time
_CACHED = 1 << 28  # bytes of metadata of its files that Lance may cache


class LanceStore:
    """Items with ids and metadata in a Lance table, which is created if missing.

    Several processes may write to it: changes to different items all succeed, and if two add the same id, one is refused.
    Every change makes a version; older ones can be opened until Lance's ``cleanup_old_versions`` removes them. Items are in
    the order of the table: added items come last, in the given order; upserted items also come last, but in an order that
    Lance chooses. An addition and a deletion read all ids of the store.

    Args:
        spec: Spec of the embeddings; of dtype float16.
        uri: Path or URI (``s3://``, ``gs://``, ``az://``).
        source: Name or path that the checkpoint was opened with, for messages and for folders that are pulled.
        storage_options: Credentials and endpoints, as Lance takes them.
        version: Version to open read-only; None: always the newest.

    Raises:
        InputError: The spec is of dtype int8.
        StoreError: The URI holds another store or a foreign table, the version does not exist, the store cannot be read or
            created, or pylance is not installed.
    """

    def __init__(
        self,
        spec: IndexSpec,
        uri: str | PathLike[str],
        *,
        source: str = "",
        storage_options: Mapping[str, str] | None = None,
        version: int | None = None,
    ) -> None:
        if spec.dtype != "float16":
            raise InputError(
                f"expected an index of dtype float16, got {spec.dtype}; index the pictures into a float16 folder, and "
                "push that"
            )
        self.spec, self.source, self.uri = spec, source, os.fspath(uri)
        self._fixed, self._options = version, dict(storage_options or {})
        self._session = lance_module().Session(metadata_cache_size_bytes=_CACHED)
        dataset = self._find(version)
        if dataset is None and version is not None:
            raise StoreError(f"there is no version {version} of a store at {self.uri}")
        if dataset is None:
            self._make()
            dataset = self.dataset()
        schema = schema_of(dataset, self.uri)
        self._compare(spec_of(schema, self.uri))
        if not schema.equals(self._schema, check_metadata=False):
            raise StoreError(f"expected a store at {self.uri} with the columns {self._schema}, got {schema}")

    def _find(self, version: int | None) -> Any:
        return find_dataset(self.uri, version, storage_options=self._options, session=self._session)

    def dataset(self) -> Any:
        """A new handle, which stays at its version."""
        dataset = self._find(self._fixed)
        if dataset is None:
            raise StoreError(f"the store at {self.uri} no longer exists; restore it, or push an index to it again")
        return dataset

    def _make(self) -> None:
        description = json.dumps({"format": _FORMAT, "source": self.source, **asdict(self.spec)})
        empty = self._schema.with_metadata({SPEC: description}).empty_table()
        try:
            lance_module().write_dataset(empty, self.uri, mode="create", storage_options=self._options)
        except (OSError, ValueError, RuntimeError) as error:
            if "already exists" not in str(error):  # otherwise another process was faster
                raise StoreError(f"cannot create a store at {self.uri}: {reason_of(error)}") from None

    def _compare(self, stored: dict[str, Any]) -> None:
        self._format = _FORMAT_OF_OLD if stored.get("format") == _FORMAT_OF_OLD else _FORMAT
        spec = {"format": self._format, **asdict(self.spec)}
        different = spec_differences(stored, spec)
        if different:
            was, current = ({key: side.get(key) for key in different} for side in (stored, spec))
            raise StoreError(
                f"the store at {self.uri} was written by checkpoint {stored.get('source')!r} with {was}, and is opened "
                f"by checkpoint {self.source!r} with {current}: open it with the checkpoint that wrote it, or create "
                "another store"
            )
        self.source = stored["source"]

    @property
    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        # The key lets Lance notice that two writers add the same id.
        key = pa.field("id", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
        tokens = pa.list_(pa.float16(), self.spec.tokens * self.spec.width)
        types = [("metadata", pa.string()), ("crc", pa.int64()), ("metadata_crc", pa.int64()), ("tokens", tokens)]
        return pa.schema([key, *(pa.field(name, kind, nullable=False) for name, kind in types)])

    @property
    def rows_of_a_change(self) -> int:
        """Maximum number of items in one change."""
        return self._rows_of(_CHANGE)

    def _rows_of(self, size: int) -> int:
        """Number of items whose embeddings take ``size`` bytes."""
        return max(1, min(_ROWS, size // (2 * self.spec.tokens * self.spec.width)))

    # Contents ----------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Version that is read; versions count the changes, from 1."""
        return int(self.dataset().version)

    def __len__(self) -> int:
        dataset = self.dataset()
        with reading(self.uri):
            return int(dataset.count_rows())

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and bool(self._present([item], self.dataset()))

    def _present(self, ids: Sequence[str], dataset: Any) -> set[str]:
        """The given ids that a dataset has."""
        present: set[str] = set()
        with reading(self.uri):
            for start in range(0, len(ids), _ROWS):
                texts = ", ".join("'" + item.replace("'", "''") + "'" for item in ids[start : start + _ROWS])
                present |= set(dataset.to_table(columns=["id"], filter=f"id IN ({texts})")["id"].to_pylist())
        return present

    def batches(self) -> Iterator[tuple[list[str], Tensor, list[dict[str, Any]], list[int]]]:
        """Yield all items of one version in order, in batches ``(ids, embeddings, metadata, crcs)``.

        The embeddings are float16 ``[n, L, D]``; their checksums have been verified.

        Raises:
            StoreError: The store cannot be read, or rows are damaged; the message names them.
        """
        for batch in self._scan(self.dataset(), _COLUMNS):
            refuse_damaged(self.damaged(batch), self.uri)
            yield batch.ids, batch.tokens, batch.metadata(self.uri), batch.crcs

    def _scan(self, dataset: Any, columns: Sequence[str]) -> Iterator[Batch]:
        with reading(self.uri):
            # By default Lance reads up to two gigabytes ahead.
            batches = dataset.to_batches(
                columns=list(columns),
                batch_size=self._rows_of(_SCAN),
                scan_in_order=True,
                batch_readahead=2,
                fragment_readahead=1,
                io_buffer_size=2 * _SCAN,
            )
            for batch in batches:
                yield self._batch(batch)

    def _batch(self, batch: pa.RecordBatch) -> Batch:
        ids, texts, crcs, metadata_crcs = (
            batch[name].to_pylist() if name in batch.schema.names else [] for name in _COLUMNS[:-1]
        )
        rows = batch["tokens"].flatten().to_numpy(zero_copy_only=True)
        # A copy, since Arrow's memory is read-only, which PyTorch warns of.
        tokens = torch.from_numpy(np.array(rows)).reshape(-1, self.spec.tokens, self.spec.width)
        return Batch(ids, texts, crcs, metadata_crcs, tokens)

    def keys(self, dataset: Any) -> Iterator[Keys]:
        """Yield the keys of all rows, in the order in which :meth:`take` counts them."""
        columns = ["id", "crc", "metadata_crc"]
        with reading(self.uri):
            for batch in dataset.to_batches(columns=columns, batch_size=_ROWS, scan_in_order=True):
                yield Keys(*(batch[name].to_pylist() for name in columns))

    def checksum(self, item: str, crc: int, text: str) -> int:
        """Expected ``metadata_crc``: of id, embedding's checksum and metadata, so that none can move to another item."""
        sealed = text if self._format == _FORMAT_OF_OLD else f"{item}\0{crc}\0{text}"
        return zlib.crc32(sealed.encode("utf-8", "surrogatepass"))

    def damaged(self, batch: Batch) -> list[str]:
        """Ids of rows that are not what was written, or that no search can compare."""
        finite = batch.tokens.flatten(1).isfinite().all(dim=1).tolist()
        rows = zip(*batch[:4], checksums({"tokens": batch.tokens}), finite, strict=True)
        return [
            item
            for item, text, crc, metadata_crc, computed, is_finite in rows
            if crc != computed or metadata_crc != self.checksum(item, crc, text) or not is_finite
        ]

    def take(self, dataset: Any, numbers: Sequence[int]) -> Batch:
        """Read rows by number."""
        with reading(self.uri):
            table = dataset.take(list(numbers), columns=_COLUMNS)
        (batch,) = table.combine_chunks().to_batches()
        return self._batch(batch)

    # Changing ----------------------------------------------------------------------------------------------------------

    def add(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Add items in one change.

        Args:
            ids: ``n`` new ids.
            embeddings: ``[n, L, D]``, unit rows.
            metadata: One dictionary of JSON values per item.

        Raises:
            InputError: An id exists already or UTF-8 cannot hold it, the embeddings have another shape, or JSON cannot hold
                the metadata.
            StoreError: The store cannot be written, or is open at an older version; nothing was added.
        """
        table = self._table(ids, embeddings, metadata)
        if not ids:
            return
        before = self.dataset()
        version = before.version
        self._refuse_known(ids, before)
        with self._writing():
            # Not merge_insert, which would ensure that ids are new but shuffles the rows.
            after = lance_module().write_dataset(table, before, mode="append", storage_options=self._options)
        if after.version > version + 1:
            self._take_back(ids, after)

    def _refuse_known(self, ids: Sequence[str], dataset: Any) -> None:
        present = self._present(ids, dataset)
        if present:
            raise id_conflict([item for item in ids if item in present], "pass other ids", "store")

    def _take_back(self, ids: Sequence[str], dataset: Any) -> None:
        """After others have written since the ids were checked, undo the last addition if its ids are no longer new.

        Raises:
            InputError: The addition was undone.
        """
        last = self._find(dataset.version - 1)
        if not self._present(ids, last):
            return
        known = {fragment.fragment_id for fragment in last.get_fragments()}
        added = [fragment.fragment_id for fragment in dataset.get_fragments() if fragment.fragment_id not in known]
        lance = lance_module()
        with self._writing():
            lance.LanceDataset.commit(
                dataset,
                lance.LanceOperation.Delete(updated_fragments=[], deleted_fragment_ids=added, predicate="true"),
                read_version=dataset.version,
            )
        self._refuse_known(ids, last)

    def upsert(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Add items, replacing those with the same ids, in one change; otherwise as :meth:`add`."""
        table = self._table(ids, embeddings, metadata)
        if ids:
            with self._writing():
                change = self.dataset().merge_insert("id")
                change.when_matched_update_all().when_not_matched_insert_all().execute(table)

    def _table(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> pa.Table:
        import pyarrow as pa

        ids, metadata = listed("ids", ids), listed("metadata", metadata)
        _check_texts(ids)
        embeddings = as_embeddings("embeddings", embeddings)
        matrices("embeddings", embeddings, (len(ids), self.spec.tokens, self.spec.width))
        if len(metadata) != len(ids):
            raise InputError(f"expected metadata for {len(ids)} ids, got {len(metadata)}")
        texts = [json.dumps(json.loads(as_json(values))) for values in metadata]
        self._refuse_if_fixed()
        tokens = embeddings.detach().cpu().to(torch.float16).contiguous()
        schema = self._schema
        crcs = checksums({"tokens": tokens})
        columns = [
            *(list(ids), texts, crcs, list(map(self.checksum, ids, crcs, texts))),
            pa.FixedSizeListArray.from_arrays(pa.array(tokens.numpy().reshape(-1)), type=schema.field("tokens").type),
        ]
        return pa.table(columns, schema=schema)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove items in one change.

        Raises:
            InputError: An id does not exist; nothing was removed.
            StoreError: The store cannot be written, or is open at an older version; nothing was removed.
        """
        self._refuse_if_fixed()
        ids = list(dict.fromkeys(ids))
        _check_texts(ids)
        present = self._present(ids, self.dataset())
        absent = [item for item in ids if item not in present]
        if absent:
            raise missing(absent, "store")
        self.remove(ids)

    def remove(self, ids: Sequence[str]) -> None:
        import pyarrow as pa

        if ids:
            keys = pa.table({"id": pa.array(ids, pa.string())})
            with self._writing():
                self.dataset().merge_insert("id").when_matched_delete().execute(keys)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._refuse_if_fixed()
        with errors_of_lance(f"the store at {self.uri} cannot be written"):
            yield

    def _refuse_if_fixed(self) -> None:
        if self._fixed is not None:
            raise StoreError(
                f"the store is open at version {self._fixed}, read-only; open it without version to change it"
            )

    # Searching ----------------------------------------------------------------------------------------------------------

    def search(self, queries: Tensor, k: int, *, alpha: float | None = None, where: str | None = None) -> SearchResults:
        """Find the ``k`` best items for each query exactly; all embeddings are read in batches, so a folder is faster.

        Args:
            queries: Embeddings ``[Q, L_q, D]``, unit rows; scored on their device.
            k: Number of items; fewer are returned if there are fewer.
            alpha: Weight of the global cosine; None: the spec's.
            where: Filter on the metadata, see :mod:`finelip_fast.index.filters`; None: all items.

        Returns:
            The same as :meth:`Index.search` over the same items; numbers and positions count them in the store's order, which
            also decides ties.

        Raises:
            InputError: ``k < 1``, the queries are not such embeddings, or the filter cannot be parsed.
            StoreError: The store cannot be read, or found rows are damaged.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        dataset, first = self.dataset(), 0
        queries = as_queries(queries, self.spec.width).to(torch.float16)
        compared = slice(1 if alpha == 1 else None)  # rows of each embedding
        scores = torch.empty(len(queries), 0, device=queries.device)
        numbers = scores.long()
        for batch in self._scan(dataset, ["tokens"] if where is None else ["id", "metadata", "tokens"]):
            among = None if where is None else torch.tensor(_matching(batch, where), dtype=torch.int64)
            if len(queries) and (among is None or len(among)):
                best, rows = clim_topk(queries[:, compared], batch.tokens[:, compared], k, alpha=alpha, among=among)
                scores, numbers = torch.cat([scores, best], 1), torch.cat([numbers, rows + first], 1)
                # The earlier of equal ones is already first; NaN goes last, unlike in descending order.
                order = (-scores).argsort(dim=1, stable=True)[:, :k]
                scores, numbers = scores.gather(1, order), numbers.gather(1, order)
            first += len(batch.tokens)
        return self._results(dataset, queries, alpha, scores.cpu(), numbers.cpu())

    def _results(self, dataset: Any, queries: Tensor, alpha: float, scores: Tensor, numbers: Tensor) -> SearchResults:
        chosen, at = numbers.unique(return_inverse=True)
        if not len(chosen):
            fine = None if self.spec.is_global else scores.clone()
            return SearchResults(scores, scores.clone(), fine, numbers, [[] for _ in queries], "exact")
        batch = self.take(dataset, chosen.tolist())
        refuse_damaged(self.damaged(batch), self.uri)
        known = zip(chosen.tolist(), batch.ids, batch.crcs, batch.metadata(self.uri), strict=True)
        items = [Item(*row) for row in known]
        tokens = batch.tokens.to(queries.device)
        cosines = (queries[:, 0].float() @ tokens[:, 0].float().T).cpu().gather(1, at)
        fine = None if self.spec.is_global else clim_scores(queries, tokens, alpha=0.0).cpu().gather(1, at)
        return SearchResults(
            scores, cosines, fine, numbers, [[items[place] for place in places] for places in at.tolist()], "exact"
        )


def open_store(
    uri: str | PathLike[str], *, storage_options: Mapping[str, str] | None = None, version: int | None = None
) -> LanceStore:
    """Open the store at a URI without its checkpoint; arguments as for :class:`LanceStore`.

    Raises:
        StoreError: There is no store, it cannot be read, or pylance is not installed.
    """
    uri = os.fspath(uri)
    dataset = find_dataset(uri, None, storage_options=dict(storage_options or {}))
    if dataset is None:
        raise StoreError(
            f"there is no store at {uri}; create it with finelip index push {shlex.quote(uri)} --index FOLDER"
        )
    stored = spec_of(schema_of(dataset, uri), uri)
    spec = IndexSpec(**{field.name: stored[field.name] for field in fields(IndexSpec) if field.name in stored})
    return LanceStore(spec, uri, source=stored["source"], storage_options=storage_options, version=version)


def _matching(batch: Batch, where: str) -> list[int]:
    """Rows that match a filter, found in the same way as in an index."""
    with closing(Catalogue(None, {}, source="")) as catalogue:
        with catalogue.changing():
            catalogue.add(batch.ids, "batch", [None] * len(batch.ids), batch.texts)
        return catalogue.matching(where, catalogue.version)


def _check_texts(ids: Sequence[str]) -> None:
    check_ids(ids)
    for item in ids:
        try:
            item.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"expected ids that UTF-8 can hold, got {item!r}; rename the file, or pass another id"
            ) from None
