"""Encoders for the ring, each with the same methods, from captions and pictures to global embeddings.

Only NumPy is imported here; a contender's process imports its own packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

CAPTIONS, PICTURES = "captions", "pictures"


class Encoder:
    """A CLIP. It is built in one process, and opened in another.

    Attributes:
        package, modules: Name of the package, as installed, and the modules imported from it and beside it.
        precision: Precision of its computations.
    """

    package = ""
    modules: Sequence[str] = ()
    precision = "fp32"

    def about(self) -> dict[str, Any]:
        """Import the packages, and return what the race has to know."""
        for module in self.modules:
            import_module(module)
        return {"package": self.package, "version": version(self.package), "precision": self.precision}

    def build(self, checkpoint: Path, folder: Path) -> None:
        """Create the files that :meth:`open` reads, in an empty folder.

        Args:
            checkpoint: Folder of ours, with the same weights in the layout of transformers in ``transformers/``.
            folder: Folder to write to.
        """

    def open(self, checkpoint: Path, folder: Path) -> None:
        raise NotImplementedError

    def encode(self, kind: str, batch: list[Any]) -> Floats:
        """Return unit rows ``[B, D]`` of captions or of PIL pictures."""
        raise NotImplementedError


class Ours(Encoder):
    """An engine of the library; the global row is the first row of each embedding."""

    package, modules = "finelip-fast", ("finelip_fast.engines",)

    def __init__(self, engine: str, precision: str = "fp32") -> None:
        self.engine, self.precision = engine, precision
        if engine == "onnx":
            self.package = "onnxruntime"

    def build(self, checkpoint: Path, folder: Path) -> None:
        if self.engine != "onnx":
            return
        import finelip_fast
        from finelip_fast.export import graphs, quantize

        model = finelip_fast.load(checkpoint)
        for name in ("image", "text"):
            graph = graphs.build(model, name)
            graphs.write(quantize.by_rows(graph) if self.precision == "int8" else graph, folder / f"{name}.onnx")

    def open(self, checkpoint: Path, folder: Path) -> None:
        import torch

        import finelip_fast
        from finelip_fast.embed import embed_images, embed_texts
        from finelip_fast.encoders import caption_lengths
        from finelip_fast.preprocess import Preprocess
        from finelip_fast.runtimes.onnx import OnnxGraph

        if self.engine == "torch":
            precision = None if self.precision == "fp32" else self.precision
            engine = finelip_fast.Retriever(checkpoint, engine="torch", device="cpu", precision=precision).engine
            self.embed = {CAPTIONS: engine.embed_texts, PICTURES: engine.embed_images}
            return
        config = finelip_fast.load(checkpoint).config
        image, text = (OnnxGraph(folder / f"{name}.onnx", torch.device("cpu")) for name in ("image", "text"))
        self.embed = {
            PICTURES: partial(embed_images, image, Preprocess.of(config)),
            CAPTIONS: partial(
                embed_texts,
                lambda ids: text(ids[:, : caption_lengths(ids).max()]),
                context_length=config.context_length,
            ),
        }

    def encode(self, kind: str, batch: list[Any]) -> Floats:
        rows: Floats = self.embed[kind](batch)[:, 0].numpy()
        return rows


class OpenClip(Encoder):
    """open_clip's own eager encoders and preprocessing; captions are padded to all positions."""

    package, modules = "open-clip-torch", ("open_clip", "finelip_fast")

    def open(self, checkpoint: Path, folder: Path) -> None:
        import open_clip
        from baselines import in_open_clip

        import finelip_fast

        model = finelip_fast.load(checkpoint)
        side, length = model.config.image_size, model.config.context_length
        self.model = in_open_clip(model)
        self.preprocess = open_clip.image_transform(side, is_train=False)
        self.tokenize = open_clip.SimpleTokenizer(context_length=length)

    def encode(self, kind: str, batch: list[Any]) -> Floats:
        import torch

        with torch.inference_mode():
            if kind == CAPTIONS:
                rows = self.model.encode_text(self.tokenize(batch), normalize=True)
            else:
                rows = self.model.encode_image(torch.stack([self.preprocess(x) for x in batch]), normalize=True)
        values: Floats = rows.float().numpy()
        return values


class SentenceTransformers(Encoder):
    """CLIP of sentence-transformers, which encodes up to the longest caption of a batch."""

    package, modules = "sentence-transformers", ("sentence_transformers",)

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def open(self, checkpoint: Path, folder: Path) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import CLIPModel

        self.model = SentenceTransformer(modules=[CLIPModel(str(checkpoint / "transformers"))], device="cpu")
        if self.precision == "bf16":
            self.model.to(torch.bfloat16)

    def encode(self, kind: str, batch: list[Any]) -> Floats:
        rows: Floats = (
            self.model.encode(
                batch, batch_size=len(batch), normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True
            )
            .float()
            .numpy()
        )
        return rows


class Infinity(Encoder):
    """infinity-emb in this process, without its server; CLIP runs only on its PyTorch engine."""

    package, modules = "infinity-emb", ("infinity_emb",)

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def open(self, checkpoint: Path, folder: Path) -> None:
        from infinity_emb import EngineArgs, SyncEngineArray

        options = EngineArgs(
            model_name_or_path=str(checkpoint / "transformers"),
            served_model_name="clip",
            engine="torch",
            device="cpu",
            dtype={"fp32": "float32", "int8": "int8"}[self.precision],
            model_warmup=False,
        )
        self.engines = SyncEngineArray.from_args([options])

    def encode(self, kind: str, batch: list[Any]) -> Floats:
        if kind == CAPTIONS:
            rows, _ = self.engines.embed(model="clip", sentences=batch).result()
        else:
            rows, _ = self.engines.image_embed(model="clip", images=batch).result()
        values = np.asarray(rows, dtype=np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


CONTENDERS: dict[str, Callable[[], Encoder]] = {
    "finelip_fast, torch, fp32": partial(Ours, "torch"),
    "finelip_fast, torch, bf16": partial(Ours, "torch", "bf16"),
    "finelip_fast, torch, int8": partial(Ours, "torch", "int8"),
    "finelip_fast, ONNX, fp32": partial(Ours, "onnx"),
    "finelip_fast, ONNX, int8": partial(Ours, "onnx", "int8"),
    "open_clip, fp32": OpenClip,
    "sentence-transformers, fp32": SentenceTransformers,
    "sentence-transformers, bf16": partial(SentenceTransformers, "bf16"),
    "infinity-emb, torch, fp32": Infinity,
    "infinity-emb, torch, int8": partial(Infinity, "int8"),
}
