"""Pickles of tensors: no code runs, memory stays bounded, and whatever PyTorch writes is read back."""

from __future__ import annotations

import builtins
import collections
import functools
import io
import json
import operator
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finelip_fast.checkpoint.weight_files import damaged_records, read_weights
from finelip_fast.errors import CheckpointError

# What PyTorch writes ----------------------------------------------------------------------------------------------------


def make_values() -> dict:
    """Return a training script's dictionary: weights, an optimizer after some steps, and tensors of every kind."""
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    table = torch.arange(12.0).reshape(3, 4)
    return {
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "parameter": nn.Parameter(table.clone()),
        "shared": [table, table[1:], table.T, table[:, 1]],
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "kinds": {str(kind): torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.half, torch.bool, torch.int8)},
        "epoch": 3,
        "milestones": collections.Counter([2, 5]),
        "more": (1.5, None, True, "text", -(1 << 40), torch.Size([2, 3])),
    }


def assert_equal(actual, expected):
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_equal(actual[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_equal(*pair)
    else:
        assert actual == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_comes_back(tmp_path, legacy):
    values = make_values()
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert_equal(read_weights(tmp_path / "x.pt"), values)


def test_types_without_a_storage_class_and_files_without_checksums(tmp_path):
    values = {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(3, dtype=torch.uint16)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(values, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = read_weights(tmp_path / "x.pt")
    assert loaded["a"].dtype == torch.float8_e4m3fn
    assert torch.equal(loaded["a"].float(), torch.ones(3))
    assert torch.equal(loaded["b"], values["b"])
    assert damaged_records(tmp_path / "x.pt") is None


def test_writing_to_a_tensor_leaves_the_file(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pt")
    read_weights(tmp_path / "x.pt")["a"].zero_()
    assert read_weights(tmp_path / "x.pt")["a"].sum() == 1000


class Block(nn.Module):
    """A module like OpenAI's: parameters, buffers, a plain tensor (CLIP's attention mask), half precision, constants."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.linear, self.shared = nn.Linear(4, 4), shared
        self.norm = nn.LayerNorm(4)
        self.register_buffer("running", torch.ones(4))
        self.mask = torch.full((4,), 2.0)
        self.sizes, self.tables = [1, 2], [torch.ones(4)]

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.shared(self.linear(self.norm(rows))) + self.running + self.mask
        return rows * self.sizes[1] + self.tables[0]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.visual = nn.Sequential(Block(shared), Block(shared))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, rows: Tensor) -> Tensor:
        return self.visual(rows) * self.logit_scale


@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_torchscript_gives_the_state_dict_of_the_module(tmp_path, kind, precision):
    towers = Towers().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(towers) if kind == "script" else torch.jit.trace(towers, torch.ones(2, 4))
        module.to(precision).save(tmp_path / "x.pt")
        expected = torch.jit.load(tmp_path / "x.pt").state_dict()
    loaded = read_weights(tmp_path / "x.pt")
    assert loaded.keys() == expected.keys() == towers.state_dict().keys()
    for name, tensor in expected.items():
        assert_equal(loaded[name], tensor)


# What others write ------------------------------------------------------------------------------------------------------


def write_zip(path: Path, content: bytes, records: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, record in {"data.pkl": content, **(records or {})}.items():
            archive.writestr(f"archive/{name}", record)
    return path


class Call:
    """An object that is pickled as a call of ``function``."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.call = function, arguments
        self.state = state

    def __reduce__(self):
        return self.call if self.state is None else (*self.call, self.state)


class Script:
    """A pickle assembled by hand, opcode by opcode."""

    def __init__(self, *parts: bytes) -> None:
        self.content = b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def code_that_runs(trace: Path) -> dict[str, bytes]:
    """Fourteen ways to have a pickle make a folder."""
    name = str(trace)
    by_hand = {
        "inst": b"(" + text(name) + b"ios\nmkdir\n",
        "obj": b"(cos\nmkdir\n" + text(name) + b"o",
        "stack global": text("os") + text("mkdir") + b"\x93" + text(name) + b"\x85R",
        "newobj ex": b"cos\nmkdir\n" + text(name) + b"\x85}\x92",
        "extension": b"\x82\x01" + text(name) + b"\x85R",
        "attribute path": b"\x80\x04" + text("torch") + text("os.mkdir") + b"\x93" + text(name) + b"\x85R",
        "persistent": text(name) + b"Q",
        "table's function": b"ctorch._utils\nos\n" + text(name) + b"\x85R",
        "module class": b"c__torch__.os\nmkdir\n" + text(name) + b"\x85R",
        "state into a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"Ns\x86b",
    }
    pickled = {
        "reduce": Call(os.mkdir, name),
        "eval": Call(eval, f"__import__('os').mkdir({name!r})"),
        "nested": {"a": [Call(functools.partial, Call(os.mkdir, name))]},
        "attribute": Call(operator.attrgetter("x"), Call(os.mkdir, name)),
        "getattr": Call(getattr, Call(os.mkdir, name), "x"),
        "map": Call(list, Call(builtins.map, os.mkdir, (name,))),
        "torch load": Call(torch.load, name),
        "torch script": Call(torch.jit.load, name),
        "file": Call(torch.from_file, name, True, 8),
        "state": Call(torch.nn.Linear, 1, 1, state={"x": Call(os.mkdir, name)}),
        "typed": Call(torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (name,), {}),
    }
    return {kind: Script(parts).content for kind, parts in by_hand.items()} | {
        kind: pickle.dumps(value, 2) for kind, value in pickled.items()
    }


@pytest.mark.parametrize("kind", code_that_runs(Path("x")))
@pytest.mark.parametrize("container", ["zip", "script", "legacy", "plain"])
def test_no_pickle_runs_anything(tmp_path, kind, container):
    trace, path = tmp_path / "trace", tmp_path / "x.pt"
    content = code_that_runs(trace)[kind]
    if container in ("zip", "script"):
        write_zip(path, content, {"constants.pkl": b"\x80\x02)."} if container == "script" else None)
    elif container == "legacy":
        heads = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": sys.byteorder == "little"}]
        path.write_bytes(b"".join(pickle.dumps(head, 2) for head in heads) + content + pickle.dumps([], 2))
    else:
        path.write_bytes(content)
    try:
        loaded = read_weights(path)
    except CheckpointError:
        loaded = {}
    assert loaded == {}  # TorchScript's own names give modules without weights, whatever they are called
    assert not list(tmp_path.glob("trace*"))


SETTING_STATE = """
class Evil(Module):
  __parameters__ = []
  __buffers__ = []
  x : Tensor
  def __getstate__(self: __torch__.Evil) -> int:
    return 1
  def __setstate__(self: __torch__.Evil, state: int) -> NoneType:
    self.x = torch.from_file("{path}", True, 8)
    return None
"""


def test_torchscript_code_never_runs(tmp_path):
    """The archive writes a file of its choice if torch.jit.load opens it."""
    trace = tmp_path / "trace"
    source = SETTING_STATE.format(path=trace).lstrip()
    content = b"\x80\x02c__torch__\nEvil\n)\x81K\x01b."
    records = {"code/__torch__.py": source.encode(), "constants.pkl": b"\x80\x02).", "version": b"3\n"}
    write_zip(tmp_path / "x.pt", content, records)
    with pytest.raises(CheckpointError, match="expected dict, got int"):
        read_weights(tmp_path / "x.pt")
    assert not trace.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(tmp_path / "x.pt")
    assert trace.exists()  # it would have run


def tensor(offset: int, size: bytes, stride: bytes, count: int = 4, key: str = "0") -> bytes:
    """Return the opcodes of one float32 tensor, with size and stride given as opcodes for tuples."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + size + stride + b"\x89}tR"


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(0, numbers(5), numbers(1)), "beyond its 4 elements"),
        (tensor(4, numbers(1), numbers(1)), "beyond its 4 elements"),
        (tensor(0, numbers(2, 2), numbers(1, 4)), "beyond its 4 elements"),
        (tensor(0, numbers(49408, 1 << 21), numbers(0, 0)), "many times the size of the file"),
        (tensor(-1, numbers(2), numbers(1)), "no natural number"),
        (tensor(0, numbers(2), numbers(-1)), "no natural number"),
        (tensor(0, numbers(1 << 60), numbers(0)), "no natural number"),
        (tensor(0, numbers(2), numbers(1, 1)), "shorter|longer"),
        (tensor(0, b"\x88\x85", numbers(1)), "no natural number"),
        (tensor(0, numbers(2), numbers(1), count=1 << 40), "no record|elements, uncompressed"),
        (tensor(0, numbers(2), numbers(1), key="../../etc/passwd"), "elements, uncompressed"),
        (b"}" + text("a") + b"}q\x00" + text("b") + b"h\x00sss", "makes no sense|empty|expected dict"),
        (b"}q\x00" + text("model") + b"h\x00s", "nesting deeper"),
        (b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 60)), "too many values|nesting"),
        (
            b"}" + b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"Ns",
            "keys are neither|expected dict",
        ),
        (b"(" * 100_000 + b"t" * 100_000, "nesting deeper"),
        (b"\x8b\xff\xff\x00\x00" + b"\x7f" * 65535, "beyond 64 bits"),
        (b"\x8c\xff", "damaged"),
        (b"0", "other Python objects"),
    ],
)
def test_what_a_pickle_asks_for_is_bounded(tmp_path, content, message):
    path = write_zip(tmp_path / "x.pt", Script(content).content, {"data/0": bytes(16)})
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_many_views_of_one_storage_are_bounded(tmp_path):
    parts = [text(str(n)) + tensor(0, numbers(1 << 20), numbers(1), count=1 << 20) for n in range(40)]
    content = Script(b"}(" + b"".join(parts) + b"u").content
    path = write_zip(tmp_path / "x.pt", content, {"data/0": bytes(1 << 22)})
    with pytest.raises(CheckpointError, match="many times the size of the file"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: write_zip(path, bytes(1 << 27), compression=zipfile.ZIP_DEFLATED), "larger than all"),
        (lambda path: write_zip(path, b"\x80\x02" + b"N" * (1 << 25) + b"."), "a pickle of"),
        (lambda path: write_zip(path, b"\x80\x02" + b"]" * (1 << 21) + b"."), "more than 1000000 operations"),
        (lambda path: write_zip(path, b"\x80\x02}.", {"byteorder": b"big"}), "byte order 'big'"),
        (lambda path: write_zip(path, b"\x80\x02}.", compression=zipfile.ZIP_BZIP2), "compressed in another way"),
        (lambda path: write_zip(path, Script(tensor(0, numbers(2), numbers(1))).content, {"data/0": bytes(16)},
                                compression=zipfile.ZIP_DEFLATED), "uncompressed"),
    ],
)  # fmt: skip
def test_archives_that_unpack_to_more_or_otherwise_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_weights(change(tmp_path / "x.pt"))


def test_two_records_of_one_name_are_refused(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", b"\x80\x02].")
    with pytest.raises(CheckpointError, match=r"two records with the name 'data\.pkl'"):
        read_weights(tmp_path / "x.pt")


def test_a_compressed_pickle_is_read(tmp_path):
    path = write_zip(tmp_path / "x.pt", pickle.dumps({"a": 1}, 2), compression=zipfile.ZIP_DEFLATED)
    assert read_weights(path) == {"a": 1}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a regular file, got a pipe"):
        read_weights(tmp_path / "x.pt")


def test_no_reader_of_pytorch_is_called():
    """torch.load and torch.jit.load run code from the file, or have done so."""
    root = Path(__file__).parents[2]
    for folder in ("finelip_fast", "training", "export", "kernels"):
        for source in (root / folder).rglob("*.py"):
            words = source.read_text()
            assert "torch.load(" not in words, source
            assert "jit.load(" not in words, source


# Anything ---------------------------------------------------------------------------------------------------------------


def seeds() -> dict[str, bytes]:
    """Return small files of every kind."""
    values = make_values()
    files = {}
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save(values, buffer, _use_new_zipfile_serialization=not legacy)
        files[f"legacy {legacy}"] = buffer.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(Towers()), buffer)
    files["script"] = buffer.getvalue()
    files["safetensors"] = safetensors.torch.save({"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.half)})
    return files


SEEDS = seeds()
PICKLES = {
    kind: zipfile.ZipFile(io.BytesIO(content)).read(name)
    for kind, content in SEEDS.items()
    if content[:2] == b"PK"
    for name in zipfile.ZipFile(io.BytesIO(content)).namelist()
    if name.endswith("/data.pkl")
}
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "copy"]),
        st.integers(0, 1 << 20),
        st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff" * 4, b"\x00" * 8, b"R", b"b", b"h\x00", b"2", b"."])),
    ),
    min_size=1,
    max_size=6,
)


def edit(content: bytes, edits) -> bytes:
    for kind, place, part in edits:
        place %= len(content) + 1
        if kind == "set":
            content = content[:place] + part + content[place + len(part) :]
        elif kind == "cut":
            content = content[:place] + content[place + len(part) :]
        elif kind == "insert":
            content = content[:place] + part + content[place:]
        else:
            content = content[:place] + content[place // 2 : place // 2 + 40] + content[place:]
    return content


def assert_error_or_weights(path: Path) -> None:
    try:
        loaded = read_weights(path)
    except CheckpointError:
        return
    assert sum(value.nbytes for value in loaded.values() if isinstance(value, Tensor)) < 1 << 26


@settings(settings.get_profile("fuzz"))
@given(kind=st.sampled_from(sorted(SEEDS)), edits=EDITS)
def test_any_damaged_file_is_an_error_or_read(tmp_path_factory, kind, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.unlink(missing_ok=True)  # never overwritten in place, because the last one may still be mapped
    path.write_bytes(edit(SEEDS[kind], edits))
    assert_error_or_weights(path)


@settings(settings.get_profile("fuzz"))
@given(kind=st.sampled_from(sorted(PICKLES)), edits=EDITS)
def test_any_damaged_pickle_is_an_error_or_read(tmp_path_factory, kind, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(io.BytesIO(SEEDS[kind])) as source:
        records = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    write_zip(path, edit(PICKLES[kind], edits), {name: r for name, r in records.items() if name != "data.pkl"})
    assert_error_or_weights(path)


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 65), 1 << 65) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(settings.get_profile("fuzz"))
@given(
    header=HEADERS
    | st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "F4", "F8_E8M0", "BOOL", "C64", "U64", "X"]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 4, 1 << 62, 1 << 63]), max_size=70),
                "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)),
            }
        ),
        max_size=3,
    ),
    size=st.none() | st.sampled_from([0, 1, 99_999_999, 1 << 40, (1 << 64) - 1]),
)
def test_any_header_of_safetensors_is_an_error_or_read(tmp_path_factory, header, size):
    text_of = json.dumps(header).encode().ljust(1)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes((len(text_of) if size is None else size).to_bytes(8, "little") + text_of + bytes(16))
    assert_error_or_weights(path)


MEASURED = """
import re, sys
from pathlib import Path
from finelip_fast.errors import CheckpointError
from finelip_fast.checkpoint.weight_files import read_weights
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is used now; `ru_maxrss` would begin with pytest's
before = peak()
try:
    read_weights(Path(sys.argv[1]))
except CheckpointError:
    pass
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_largest_pickle_that_is_taken_needs_bounded_memory_and_time(tmp_path):
    content = b"\x80\x02" + b"(" + (b"}" + text("a") + b"}s") * 250_000 + b"l."
    path = write_zip(tmp_path / "x.pt", content[: (1 << 24) - 1])
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, path], capture_output=True, text=True, timeout=300, check=True
    )
    assert float(process.stdout) < 1024, "MiB"
