"""Race from a folder of photographs to embeddings on disk: ours, open_clip in a loop, and clip-retrieval's approach.

``FINELIP_BENCH_PHOTOS`` (2,000) JPEG files of 12 megapixels below ``FINELIP_BENCH_FOLDER`` (the system's temporary folder),
in the page cache when they are read; an encoder of ViT-B/16's size with the same random weights for all. Ours also
aggregates and stores the rows of the patches; the others store the global embedding. clip-retrieval's approach is a PyTorch
``DataLoader`` whose processes decode and resize, batches of 64, and one ``.npy`` of float16; it is reimplemented here
because the package pins an old PyTorch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import in_open_clip
from contest import Result, clock
from inputs import ON_GPU
from photographs import photographs, scratch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import finelip_fast
from finelip_fast import FineLIP, FineLIPConfig, Retriever
from finelip_fast.frozen import why_not
from finelip_fast.index import stored_index

COUNT = int(os.environ.get("FINELIP_BENCH_PHOTOS", 2_000))
ROUNDS, AT_ONCE = 3, 64
LEAST_COSINE = 0.999  # between our global embeddings and open_clip's, in float32; int8 only needs finite rows

LOOP, LOADER = "open_clip in a loop", "open_clip behind a DataLoader"
OURS, INT8 = "finelip_fast, torch float32", "finelip_fast, torch int8"


class Pictures(Dataset[Tensor]):
    """Pixels of files, preprocessed as open_clip does."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self._paths[number]) as image:
            return self._transform(image)


def embedded(pictures: Pictures, encode: Callable[[Tensor], Tensor], out: Path, *, workers: int | None) -> None:
    """Write the embeddings of all pictures to a file, encoded one by one or in batches that worker processes prepare."""
    with torch.inference_mode():
        if workers is None:
            rows = [encode(pictures[number][None]) for number in range(len(pictures))]
        else:
            rows = [encode(batch) for batch in DataLoader(pictures, AT_ONCE, num_workers=workers)]
    np.save(out, F.normalize(torch.cat(rows), dim=-1).half().numpy())


def indexed(photos: Path, checkpoint: Path, index: Path, *, precision: Any) -> None:
    with Retriever(checkpoint, engine="torch", device="cpu", precision=precision, index=index) as retriever:
        retriever.add_folder(photos, progress=False)


@cache
def measured() -> dict[str, Result]:
    from open_clip.transform import image_transform

    with scratch() as folder:
        torch.manual_seed(0)
        model = FineLIP(FineLIPConfig.preset("ViT-B-16")).eval()
        finelip_fast.save(model, folder / "model")
        photographs(folder / "photos", COUNT)
        transform: Any = image_transform(model.config.image_size, is_train=False)
        pictures = Pictures(sorted((folder / "photos").rglob("*.jpg")), transform)
        write = partial(embedded, pictures, in_open_clip(model).encode_image)
        index_photos = partial(indexed, folder / "photos", folder / "model")
        contenders: dict[str, Callable[[Path], None]] = {
            LOOP: lambda out: write(out.with_suffix(".npy"), workers=None),
            LOADER: lambda out: write(out.with_suffix(".npy"), workers=torch.get_num_threads()),
            OURS: lambda out: index_photos(out, precision="fp32"),
        }
        if why_not("int8") is None:
            contenders[INT8] = lambda out: index_photos(out, precision="int8")
        results = {name: Result() for name in contenders}
        for turn in range(ROUNDS):
            for number, (name, run) in enumerate(contenders.items()):
                start = time.perf_counter()
                run(folder / f"{turn} {number}")
                results[name].seconds.append(time.perf_counter() - start)
        check(pictures, folder / "0 0.npy", folder / "0 2")
    for result in results.values():
        quantiles = np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist()
        result.info |= dict(zip(("p20", "p50", "p80"), quantiles, strict=True))
        result.info["items_per_second"] = COUNT / result.info["p50"]
    return results


def check(pictures: Pictures, out: Path, index: Path) -> None:
    """Compare our global embeddings with open_clip's of the same files."""
    with stored_index(index) as stored:
        rows = dict(zip((Path(name).name for name in stored.ids), stored.embeddings[:, 0].float(), strict=True))
    embeddings = torch.stack([rows[path.name] for path in pictures._paths])
    cosines = (embeddings * torch.from_numpy(np.load(out)).float()).sum(dim=1)
    assert cosines.min() >= LEAST_COSINE, cosines.min()


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [LOOP, LOADER, OURS, INT8])
def test_indexing(benchmark: Any, contender: str) -> None:
    clock.into(benchmark, measured(), contender, group=f"embed and keep {COUNT:,} photographs", baseline=LOADER)
