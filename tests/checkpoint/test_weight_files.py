"""Weight files: identified by content, never executed, with errors that name what was found."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from finelip_fast.checkpoint.weight_files import read_weights
from finelip_fast.errors import CheckpointError


class Node(nn.Module):
    """A module of parameters and nested nodes, which represents any state dict in TorchScript."""

    def forward(self) -> int:
        return 0


def as_module(state: dict[str, Tensor]) -> nn.Module:
    root = Node()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        node = root
        for step in path:
            if step not in node._modules:
                node.add_module(step, Node())
            node = node._modules[step]
        node.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def write_torchscript(state, path):
    # OpenAI's archives have half precision, and three sizes among the weights.
    module = as_module({name: tensor.half() for name, tensor in state.items()})
    for name, size in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        module.register_buffer(name, torch.tensor(size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)


WRITERS = {
    "zip": lambda state, path: torch.save(state, path),
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested": lambda state, path: torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path
    ),
    "safetensors": lambda state, path: safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path),
    "torchscript": write_torchscript,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_recognised_by_their_content(kind, tmp_path):
    path = tmp_path / "weights.any"
    state = {"visual.proj": torch.randn(3, 4), "ln_final.bias": torch.randn(5), "logit_scale": torch.tensor(2.5)}
    WRITERS[kind](state, path)
    loaded = read_weights(path)
    if kind == "nested":
        loaded = {name.removeprefix("module."): tensor for name, tensor in loaded["state_dict"].items()}
    for name, tensor in state.items():
        expected = tensor.half() if kind == "torchscript" else tensor
        assert torch.equal(loaded[name], expected), name


class Malice:
    """Creates a directory when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_unexecuted(tmp_path, legacy):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"a": torch.zeros(1), "b": Malice(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"never executed.*torch\.load with weights_only=False"):
        read_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run


@pytest.mark.parametrize(
    ("saved", "reader"),
    [
        (nn.Linear(2, 2), "torch.load with weights_only=False"),
        ({"state_dict": nn.Linear(2, 2).state_dict(), "scheduler": Node()}, "torch.load with weights_only=False"),
        ({"state_dict": nn.Linear(2, 2).state_dict()}, "pickle.load"),
    ],
)
def test_what_is_advised_for_other_python_objects_can_be_done(tmp_path, saved, reader):
    path, new = tmp_path / "saved.pt", tmp_path / "new.pt"
    path.write_bytes(pickle.dumps(saved)) if reader == "pickle.load" else torch.save(saved, path)
    with pytest.raises(CheckpointError, match=re.escape(f"load it once with {reader}")) as caught:
        read_weights(path)
    readers = {"pickle.load": lambda: pickle.loads(path.read_bytes())}
    content = readers.get(reader, lambda: torch.load(path, weights_only=False))()
    advice = re.findall(r"(torch\.save\(saved.*?, new\)) for a (module|checkpoint)", str(caught.value))
    for call, kind in advice:
        if (kind == "module") == isinstance(content, nn.Module):
            exec(call, {"torch": torch, "saved": content, "new": new})
    assert read_weights(new).keys() == {"weight", "bias"}


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path, state: path.write_text("not a checkpoint, a text"),
            "safetensors.*found a file that starts with b'not a",
        ),
        (lambda path, state: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"), r"starts with b'\\xff\\xd8"),
        (lambda path, state: path.write_bytes(b""), "found an empty file"),
        (lambda path, state: path.write_bytes(pickle.dumps({"a": 1})), "other Python objects"),
        (
            lambda path, state: (torch.save(state, path), path.write_bytes(cut(path.read_bytes()))),
            "truncated or damaged",
        ),
        (lambda path, state: (WRITERS["legacy"](state, path), path.write_bytes(path.read_bytes()[:999])), "damaged"),
        (
            lambda path, state: (WRITERS["safetensors"](state, path), path.write_bytes(cut(path.read_bytes()))),
            "truncated or damaged",
        ),
    ],
)
def test_files_that_are_no_checkpoint(make, message, tmp_path):
    path = tmp_path / "file.pt"
    make(path, {f"part.{i}": torch.zeros(100) for i in range(20)})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "letter.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(CheckpointError, match=r"a zip archive with document\.xml"):
        read_weights(tmp_path / "letter.docx")
