"""Parts that all commands share: ``--json`` and ``--quiet``, printing of results, and responses to mistyped words."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from finelip_fast._files import write_error
from finelip_fast._terminal import printable, printable_lines
from finelip_fast.cli import usage
from finelip_fast.cli.values import DESCRIPTION, Number, OneOf, with_type
from finelip_fast.errors import FineLIPError, InputError, WriteError

if TYPE_CHECKING:
    from finelip_fast.engines import EngineName
    from finelip_fast.runtimes.manifest import Precision

DEFAULT_INDEX, INDEX_VARIABLE = "finelip-index", "FINELIP_INDEX"

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@dataclass
class Nothing:
    """An empty result, with the reason, which is no part of the result and goes to the standard error stream."""

    reason: str

    def to_dict(self) -> list[Any]:
        """An empty list for JSON."""
        return []

    def __str__(self) -> str:
        return self.reason


class Command(click.Command):
    """A command whose function returns a result, which is printed as text, or with ``--json`` as one JSON document.

    An iterator is printed item by item, so that memory does not grow with it.

    Args:
        renamed: Current names of options, by their former names.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "context_settings": {**_SETTINGS, "allow_extra_args": True}})
        self.renamed = renamed or {}
        self.params = [
            *map(with_type, self.params),
            click.Option(["--json"], is_flag=True, help="Print one JSON document instead of text."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Show no progress bars and no warnings."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command's name."""
        ctx.meta[__name__] = _Running([*ctx.command_path.split(), *args])
        args = _repeat_options(self.get_params(ctx), args)
        try:
            extra = super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            name = self.renamed.get(error.option_name)
            raise click.UsageError(
                f"{error.option_name} is called {name} now."
                if name is not None
                else usage.unknown_option(error.option_name, self.get_params(ctx)),
                ctx,
            ) from None
        except click.MissingParameter:
            typed, *_ = self.make_parser(ctx).parse_args(args)
            raise click.UsageError(usage.missing(self.get_params(ctx), typed), ctx) from None
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # whose usage is shown
            raise
        if extra and not ctx.resilient_parsing:
            raise click.UsageError(usage.extra_words(ctx, extra), ctx)
        return extra

    def get_short_help_str(self, limit: int = 200) -> str:
        """The first sentence, whole."""
        return super().get_short_help_str(max(limit, 200))

    def invoke(self, ctx: click.Context) -> None:
        """Run the function, print its result, and then do what was registered by :func:`after_result`."""
        running: _Running = ctx.meta[__name__]
        running.speaks_json = ctx.params.pop("json")
        running.is_quiet = ctx.params.pop("quiet")
        with _no_warnings() if running.is_quiet else nullcontext(), _options_in_errors(self.get_params(ctx)):
            result = super().invoke(ctx)
            if isinstance(result, Nothing) and not running.speaks_json:
                print(printable_lines(result), file=sys.stderr)
            else:
                for piece in as_json(result) if running.speaks_json else as_text(result):
                    sys.stdout.write(piece)
            for act in running.after:
                act()


class Group(click.Group):
    """A group of commands. A name of two words, such as ``eval compare``, extends a name that is a command by itself.

    Args:
        moved: Current commands, by their former or supposed names in this group.
        otherwise: Suggestion for a folder instead of a command; ``{}`` is replaced with the folder.
    """

    command_class = Command

    def __init__(
        self, *args: Any, moved: Mapping[str, str] | None = None, otherwise: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{**kwargs, "context_settings": _SETTINGS, "no_args_is_help": False})
        self.moved, self.otherwise = moved or {}, otherwise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the group's name; ``help COMMAND`` is ``COMMAND --help``."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            ctx.exit(2)
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            message = usage.options_first(ctx, error.option_name, args, self.commands)
            raise click.UsageError(message, ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command named by the first word or the first two words."""
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise click.UsageError(self._unknown(ctx, args[0]), ctx)
        return super().resolve_command(ctx, args)

    def get_short_help_str(self, limit: int = 200) -> str:
        """The first sentence, whole."""
        return super().get_short_help_str(max(limit, 200))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Complete names of one word; names of two words are completed after the first word."""
        return [item for item in super().shell_complete(ctx, incomplete) if " " not in item.value]

    def _unknown(self, ctx: click.Context, word: str) -> str:
        names = self.list_commands(ctx)
        expected = f"Expected a command of {ctx.command_path}, got {word[:80]!r}."
        if word in self.moved:
            return f"{expected} Use {self.moved[word]}."
        if self.otherwise is not None and os.path.isdir(word):
            return f"{expected} {self.otherwise.format(shlex.quote(word[:80]))}"
        if near := usage.nearest(word, names):
            return f"{expected} Did you mean {near[0]}?"
        return f"{expected} There are {', '.join(names)}."


class Several(click.Option):
    """An option that takes one or more values: ``--seeds 0 1 2``, or ``--seeds 0 --seeds 1``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})

    def make_metavar(self, *args: Any, **kwargs: Any) -> str:
        """Return the metavar followed by dots."""
        return f"{super().make_metavar(*args, **kwargs)}..."


class ModelOptions(NamedTuple):
    """Options that choose a model and how it runs."""

    checkpoint: str | None
    engine: EngineName
    precision: Precision | None
    device: str | None

    def open_engine(self) -> Any:
        """Open the engine that encodes."""
        from finelip_fast.engines import open_engine

        return open_engine(self.engine, self.checkpoint, self.device, precision=self.precision)

    def open_retriever(self, index: str, **options: Any) -> Any:
        """Open a retriever on an index, with the index's checkpoint if none is named."""
        from finelip_fast.known_checkpoints import checkpoint_of
        from finelip_fast.retriever import Retriever

        checkpoint = self.checkpoint or checkpoint_of(index)
        return Retriever(
            checkpoint, engine=self.engine, precision=self.precision, device=self.device, index=index, **options
        )


ENGINES = OneOf("auto", "torch", "onnx", "trt")
PRECISIONS = OneOf("fp32", "fp16", "bf16", "int8", "int8-calibrated")
DTYPES = OneOf("float16", "int8")


def _checkpoint_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    forms = "a folder, a file, open_clip:MODEL/WEIGHTS or a hub name"
    return click.option("--checkpoint", help=f"Checkpoint: {forms}.  [default: {default}]")


checkpoint_option = _checkpoint_option("the index's, or the bundled one")
standalone_checkpoint_option = _checkpoint_option("the bundled one")
engine_option = click.option(
    "--engine", type=ENGINES, default="auto", help="Engine for encoding: auto, torch, onnx, trt."
)
precision_option = click.option(
    "--precision",
    type=PRECISIONS,
    help="Precision of exported files, or of PyTorch on a CPU: fp32, fp16, bf16, int8.  "
    "[default: the fastest exported file, or fp32]",
)
device_option = click.option(
    "--device",
    type=OneOf("cpu", "cuda", closed=False),
    help="Device to compute on: cpu, cuda.  [default: a GPU if there is one]",
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the model options to a command on an index; its function receives them as ``model``."""
    return checkpoint_option(_with_model(function))


def standalone_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the model options to a command without an index; its function receives them as ``model``."""
    return standalone_checkpoint_option(_with_model(function))


def _with_model(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def with_model(
        *, checkpoint: str | None, engine: EngineName, precision: Precision | None, device: str | None, **options: Any
    ) -> Any:
        return function(model=ModelOptions(checkpoint, engine, precision, device), **options)

    return engine_option(precision_option(device_option(with_model)))


dtype_option = click.option(
    "--dtype", type=DTYPES, help="Number type that a new index stores: float16, int8.  [default: float16]"
)
index_option = click.option(
    "--index",
    default=DEFAULT_INDEX,
    envvar=INDEX_VARIABLE,
    show_default=False,
    metavar="FOLDER",
    help=f"Folder of the index.  [default: {INDEX_VARIABLE}, or {DEFAULT_INDEX}]",
)
text_argument = click.argument("text", type=DESCRIPTION)
alpha_option = click.option(
    "--alpha", type=float, help="Weight of the global score, from 0 to 1.  [default: the checkpoint's]"
)
batch_size_option = click.option("--batch-size", type=int, default=64, help="Pictures or captions per batch.")


def _limit_picture_memory(ctx: click.Context, _: click.Parameter, value: int | None) -> None:
    """Limit the memory for decoding a picture, in MiB, in this command and the processes that it starts."""
    from finelip_fast._decode import VARIABLE

    if value is not None:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(value)

        @ctx.call_on_close
        def restore() -> None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


decode_memory_option = click.option(
    "--decode-memory",
    type=Number(1, 10**8),
    metavar="MIB",
    callback=_limit_picture_memory,
    expose_value=False,
    help="Memory limit for decoding one picture; all at once take at most twice as much.  [default: 1024]",
)


def shows_progress() -> bool:
    """Return whether the running command shows progress bars: in a terminal, as a file would keep all their states."""
    return not is_quiet() and sys.stderr.isatty()


def is_quiet() -> bool:
    """Return whether the running command prints nothing but its result."""
    return _running().is_quiet


def speaks_json() -> bool:
    """Return whether the running command prints JSON."""
    return _running().speaks_json


def after_result(act: Callable[[], object]) -> None:
    """Do something after the result is printed, so that the result is not lost if it fails."""
    _running().after.append(act)


def check_file(option: str, path: str | os.PathLike[str] | None) -> None:
    """Check that a file can be where an option names it, before the work whose result it will hold.

    Raises:
        InputError: The path is a folder or empty, or the file's folder does not exist.
    """
    if path is not None and (not os.path.basename(path) or os.path.isdir(path) or not os.path.isdir(Path(path).parent)):
        raise InputError(f"expected {option} as a file in an existing folder, got {os.fspath(path)!r:.200}")


def write_after_result(path: str, write: Callable[[str], object]) -> None:
    """Write a file after the result is printed, and print its path.

    Args:
        path: Path of the file.
        write: Function that writes the file to the path that it is given.
    """

    def act() -> None:
        try:
            write(path)
        except WriteError:
            raise
        except OSError as error:
            raise write_error(path, error) from None
        except ValueError as error:  # an empty name; a format that Matplotlib does not write
            raise InputError(f"expected a file that can be written, got {path!r}: {error}") from None
        print(printable(path), file=sys.stderr)

    after_result(act)


def command_line() -> str:
    """Return the running command as it would be typed."""
    return shlex.join(_running().words)


def as_json(result: Any) -> Iterator[str]:
    """Yield one JSON document in pieces."""
    if isinstance(result, Iterator):
        separator = "["
        for item in result:
            yield separator + _document(item)
            separator = ",\n"
        yield "[]\n" if separator == "[" else "]\n"
    else:
        yield _document(result) + "\n"


def as_text(result: Any) -> Iterator[str]:
    """Yield text for people: dictionaries as indented names, lists and iterators item by item, all else as its ``str``."""
    if isinstance(result, Mapping):
        yield from (f"{line}\n" for line in _indented(result))
    elif type(result) is list or isinstance(result, Iterator):  # no subclass with its own str, such as Hits
        for item in result:  # a string is a name and stays on one line
            yield from [printable(item), "\n"] if isinstance(item, str) else as_text(item)
    else:
        yield printable_lines(result) + "\n"


@dataclass
class _Running:
    """The running command: its words, and what it does after its result."""

    words: list[str]
    after: list[Callable[[], object]] = field(default_factory=list)
    is_quiet: bool = False
    speaks_json: bool = False


def _running() -> _Running:
    running: _Running = click.get_current_context().meta[__name__]
    return running


def _document(value: Any) -> str:
    return json.dumps(value.to_dict() if hasattr(value, "to_dict") else value, default=vars)


def _indented(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{printable(name)}:", *_indented(value, indent + "  ")]
        else:
            lines.append(f"{indent}{printable(name)}: {printable(_phrase(value))}")
    return lines


def _phrase(value: Any) -> str:
    if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@contextmanager
def _options_in_errors(params: Sequence[click.Parameter]) -> Iterator[None]:
    """Let the library's errors name arguments as the options that set them."""
    try:
        yield
    except FineLIPError as error:
        error.args = tuple(usage.typed_options(a, params) if isinstance(a, str) else a for a in error.args)
        raise


@contextmanager
def _no_warnings() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _repeat_options(params: Sequence[click.Parameter], args: list[str]) -> list[str]:
    """Repeat an option of several values before each of them, as Click expects it."""
    names = {name for param in params if isinstance(param, Several) for name in param.opts}
    repeated: list[str] = []
    option, count = None, 0
    for place, word in enumerate(args):
        if word == "--":
            return [*repeated, *args[place:]]
        if word.startswith("-") and len(word) > 1:
            option, count = (word if word in names else None), 0
        elif option is not None:
            count += 1
            if count > 1:
                repeated.append(option)
        repeated.append(word)
    return repeated
