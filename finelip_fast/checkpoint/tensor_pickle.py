"""Pickles of tensors, read by our own interpreter, which cannot run anything that a file names.

A pickle is a program. Python's interpreter for it imports and calls whatever the program names, and runs an object's own
``__setstate__`` on data from the file. This interpreter knows numbers, strings, lists, dictionaries, tensors and a fixed
table of names. A TorchScript module becomes :class:`Module`, which only holds its attributes. Anything else that a file
names is refused, and the error says its name.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Far more than any state dict with its optimizer needs: a few hundred kilobytes, about 50 operations per tensor.
MAX_BYTES = 1 << 24
_MAX_OPERATIONS = 1_000_000
_MAX_DEPTH = 64

# Limit on the total size of tensors, which may share memory: a multiple of the file's size, plus spare bytes for small files.
_SHARED = 4
_SPARE = 1 << 24

# Function from a storage's dtype, key and number of elements to a one-dimensional tensor.
Storage = Callable[[torch.dtype, str, int], Tensor]


@dataclass
class Module:
    """A module as TorchScript stores it: the name of its class and its attributes."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Global:
    """A name on the stack, either from the table or of a TorchScript class."""

    name: str


@dataclass(frozen=True)
class Remark:
    """An object that a training script keeps beside its weights; its content is not read."""

    name: str


@dataclass(frozen=True)
class _Flat:
    """A storage on the stack, from which tensors are made."""

    elements: Tensor


_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def _first(value: Any, *_: Any) -> Any:
    return value


def _all(*values: Any) -> tuple[Any, ...]:
    return values


def _dictionary(items: Any = None) -> dict[Any, Any]:
    pairs = _checked(items, list) if isinstance(items, list) else _checked(items or {}, dict).items()
    return _with_items({}, [part for pair in pairs for part in _checked(pair, (list, tuple))])


# Results of the permitted calls, except the tensors' rebuilders.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "torch.device": _all,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": _first,
    "builtins.complex": _all,
    "_codecs.encode": _first,
}
# Objects that become a Remark: NumPy scalars and arrays, as optimizers and schedulers keep them, options, paths and times.
_REMARKS = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "torch.torch_version.TorchVersion"),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("builtins.list", "builtins.dict", "builtins.int", "builtins.float"),  # named by a defaultdict
}
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_REBUILDERS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_WITH_TYPE = "torch._tensor._rebuild_from_type_v2"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ATOMS = {"BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINFLOAT"}
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = {
    *(
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "TUPLE",
        "BINGET",
        "LONG_BINGET",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "SETITEM",
    ),
    *("SETITEMS", "APPEND", "APPENDS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}
_KNOWN = _ATOMS | _INTEGERS | _OTHERS | _CONSTANTS.keys() | _EMPTY.keys() | _TUPLES.keys()
_OPERATIONS = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def read_pickle(stream: IO[bytes], storage: Storage | None = None, *, room: int = 0, modules: bool = False) -> Any:
    """Read the pickle at the stream's position, and leave the stream just after it.

    Args:
        stream: Bytes in memory.
        storage: Function that returns the memory of tensors. None: a pickle without tensors.
        room: Size of the whole file in bytes, which limits the total size of tensors to a few times as much.
        modules: Whether to accept ``__torch__`` classes, as in a TorchScript archive.

    Returns:
        A value of dictionaries, lists, tuples, strings, numbers, None, tensors, :class:`Module` and :class:`Remark`; other
        types of the format (sets, sizes, devices) become one of these. Nesting is at most 64 deep, without cycles.

    Raises:
        pickle.UnpicklingError: The pickle names an object that is not in the table; nothing in it was run.
        ValueError: A damaged pickle, or one that asks for more than its file contains.
    """
    machine = _Machine(storage, room * _SHARED + _SPARE, modules)
    try:
        for _ in range(_MAX_OPERATIONS):
            opcode = _OPERATIONS[stream.read(1)]
            if opcode.name not in _KNOWN:  # before its argument is read
                raise pickle.UnpicklingError(f"an object by the operation {opcode.name}")
            if opcode.name == "GLOBAL":  # pickletools' reader warns about backslashes
                argument: Any = [stream.readline().rstrip(b"\n").decode("ascii") for _ in range(2)]
            else:
                argument = opcode.arg.reader(stream) if opcode.arg else None
            machine.step(opcode.name, argument)
            if opcode.name == "STOP":
                break
        else:
            raise ValueError(f"a pickle of more than {_MAX_OPERATIONS} operations")
        value = machine.stack.pop()
    except pickle.UnpicklingError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"a pickle that makes no sense: {type(error).__name__}: {error!s:.200}") from error
    _check_size(value, [_MAX_OPERATIONS], _MAX_DEPTH)
    return value


class _Machine:
    """The stack, marks and memo of one pickle."""

    def __init__(self, storage: Storage | None, room: int, modules: bool) -> None:
        self.storage, self.room, self.modules = storage, room, modules
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ATOMS:
            stack.append(argument)
        elif name in _INTEGERS:
            if not -(1 << 63) <= argument < 1 << 64:
                raise ValueError("an integer beyond 64 bits")
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._marked()
            _with_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._marked()
            _checked(stack[-1], list).extend(items)
        elif name == "GLOBAL":
            stack.append(self._global(*argument))
        elif name == "STACK_GLOBAL":
            stack.append(self._global(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            stack.append(self._call(_checked(function, _Global).name, _checked(arguments, tuple)))
        elif name == "BUILD":
            self._build(stack[-2], stack.pop())
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        del self.stack[-count:]
        if len(values) < count:
            raise ValueError("an empty stack")
        return values

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _global(self, module: Any, name: Any) -> Any:
        full = f"{_checked(module, str)}.{_checked(name, str)}".replace("__builtin__.", "builtins.", 1)
        if full.startswith("torch.") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        is_module = self.modules and (module == "__torch__" or module.startswith("__torch__."))
        known = (_CALLS, _REMARKS, _REBUILDERS, _TYPES, {_WITH_TYPE})
        if is_module or any(full in names for names in known):
            return _Global(full)
        raise pickle.UnpicklingError(f"{full:.80}")

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in _REBUILDERS:
            return self._tensor(*arguments)
        if name in _CALLS:
            return _CALLS[name](*arguments)
        if name in _REMARKS:
            return Remark(name)
        if name == _WITH_TYPE:
            function, _, inner, _ = arguments
            return self._call(_checked(function, _Global).name, _checked(inner, tuple))
        if name.startswith("__torch__."):
            return Module(name)
        raise pickle.UnpicklingError(f"{name:.80}")

    @staticmethod
    def _build(target: Any, state: Any) -> None:
        if isinstance(target, Module):
            # A class with its own __getstate__ may store anything else, which only its code could read.
            target.attributes = {_checked(name, str): value for name, value in _checked(state, dict).items()}
        elif not isinstance(target, (dict, Tensor, Remark)):  # their state is ignored
            raise pickle.UnpicklingError(f"a state of {type(target).__name__}")

    def _persistent(self, reference: Any) -> _Flat:
        kind, dtype, key, _, count, *view = _checked(reference, tuple)
        if _checked(kind, str) != "storage" or self.storage is None:
            raise pickle.UnpicklingError(f"a persistent object {kind!r:.40}")
        elements = self.storage(_checked(dtype, torch.dtype), _checked(key, str), _natural(count))
        if view and view[0] is not None:  # a part of a storage, as in old files
            _, start, size = _checked(view[0], tuple)
            if _natural(start) + _natural(size) > count:
                raise ValueError("a view beyond its storage")
            elements = elements[start : start + size]
        return _Flat(elements)

    def _tensor(self, flat: Any, offset: Any, size: Any, stride: Any, *options: Any) -> Tensor:
        """Make a tensor in its storage; ``options`` are whether it requires gradients, its hooks, and a dtype."""
        elements = _checked(flat, _Flat).elements
        for dtype in options[2:]:  # anything but a dtype: a flag that values are conjugated or negated when read
            elements = elements.view(_checked(dtype, torch.dtype))
        size, stride = ([_natural(number) for number in _checked(numbers, tuple)] for numbers in (size, stride))
        count = math.prod(size)
        last = _natural(offset) + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count and last >= elements.numel():
            raise ValueError(f"a tensor {size} with strides {stride} beyond its {elements.numel()} elements")
        self.room -= count * elements.itemsize
        if self.room < 0:
            raise ValueError("tensors of many times the size of the file")
        return elements.as_strided(size, stride, offset)


def _with_items(target: Any, items: list[Any]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = _checked(target, dict)
    keys = items[::2]
    # Hashing a nested tuple may take forever.
    if len(items) % 2 or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError("a dictionary whose keys are neither texts nor numbers")
    mapping.update(zip(keys, items[1::2], strict=True))
    return mapping


def _checked(value: Any, kind: type[T] | tuple[type[T], ...]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"expected {getattr(kind, '__name__', 'pair')}, got {type(value).__name__}")
    return value


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 48:
        raise ValueError("a size, stride or offset that is no natural number")
    return number


def _check_size(value: Any, left: list[int], depth: int) -> None:
    """Refuse cycles, and values that are small as a pickle but practically endless to traverse."""
    left[0] -= 1
    if depth == 0 or left[0] < 0:
        raise ValueError(f"nesting deeper than {_MAX_DEPTH}, or too many values")
    if isinstance(value, Module):
        value = value.attributes
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_size(part, left, depth - 1)
