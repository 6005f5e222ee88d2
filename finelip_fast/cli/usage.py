"""Answers to command lines that cannot be parsed: what was probably meant, as it can be typed."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

import click

# What other programs call our options. Each is suggested only by commands that have it.
_SYNONYMS = {
    "--model": "--checkpoint",
    "--weights": "--checkpoint",
    "--output": "--out",
    "-o": "--out",
    "--limit": "-k",
    "--top": "-k",
    "--top-k": "-k",
    "-n": "-k",
    "--num": "-k",
    "--filter": "--where",
    "--gpu": "--device cuda",
    "--cpu": "--device cpu",
    "--lr": "--aggregator-lr and --encoder-lr",
    "--learning-rate": "--aggregator-lr and --encoder-lr",
    "--silent": "--quiet",
    "--force": "--again",
    "--overwrite": "--again",
}
_RESUME = ("--resume", "--continue")


def unknown_option(name: str, params: Sequence[click.Parameter]) -> str:
    """Return the message for an option that a command does not have.

    Args:
        name: Option as typed.
        params: Parameters of the command.
    """
    flags = [
        flag for param in params if isinstance(param, click.Option) for flag in (*param.opts, *param.secondary_opts)
    ]
    message = f"There is no option {name:.80}"
    if name in _RESUME and "--out" in flags:
        return f"{message}: to resume, run it again with the same --out."
    synonym = _SYNONYMS.get(name, "")
    near = [synonym] if synonym.partition(" ")[0] in flags else nearest(name, flags)
    return f"{message}. Did you mean {near[0]}?" if near else f"{message}."


def nearest(word: str, known: Collection[str]) -> list[str]:
    """Return the known word that is spelled most like a word, or nothing."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.75)


def missing(params: Sequence[click.Parameter], typed: Mapping[str, object]) -> str:
    """Return the message for required parameters that were not typed, all of them at once.

    Args:
        params: Parameters of the command.
        typed: Values of the parameters that were typed.
    """
    absent = [param for param in params if param.required and not _is_typed(typed.get(param.name or ""))]
    groups = {
        "argument": [_metavar(param) for param in absent if isinstance(param, click.Argument)],
        "option": [longest(param.opts) for param in absent if isinstance(param, click.Option)],
    }
    parts = [f"{kind}{'s' if len(names) > 1 else ''} {_listed(names)}" for kind, names in groups.items() if names]
    return f"Missing {_listed(parts)}."


def extra_words(ctx: click.Context, words: Sequence[str]) -> str:
    """Return the message for words after the last argument of a command.

    Args:
        ctx: Context of the command, with the values of its arguments.
        words: Extra words.
    """
    message = f"Got unexpected extra argument{'s' if len(words) > 1 else ''} {' '.join(map(shlex.quote, words)):.80}"
    arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)]
    takes_index = any("--index" in param.opts for param in ctx.command.params)
    if takes_index and len(words) == 1 and (not arguments or os.path.isdir(words[0])):
        return f"{message}. Did you mean --index {shlex.quote(words[0]):.80}?"
    if arguments and arguments[-1].name == "text":
        values = [str(ctx.params[param.name or ""]) for param in arguments]
        line = shlex.join([*values[:-1], " ".join([values[-1], *words])])
        return f"{message}. Put the description in quotes: {ctx.command_path} {line:.200}"
    return f"{message}."


def options_first(ctx: click.Context, option: str, args: Sequence[str], commands: Collection[str]) -> str:
    """Return the message for an option between a group and its command.

    Args:
        ctx: Context of the group.
        option: Option as typed.
        args: Words after the group's name.
        commands: Names of the group's commands.
    """
    place = next((place for place, word in enumerate(args) if word in commands), len(args))
    command = args[place] if place < len(args) else "COMMAND"
    line = shlex.join([command, *args[place + 1 :], *args[:place]])
    return f"Options follow the command, and {option:.80} stands before it: {ctx.command_path} {line:.200}"


def typed_options(message: str, params: Sequence[click.Parameter]) -> str:
    """Return the library's message on arguments as one on options: ``--device cpu`` instead of ``device='cpu'``."""
    flags = {param.name: longest(param.opts) for param in params if isinstance(param, click.Option) and param.name}
    names = "|".join(map(re.escape, flags))

    def as_typed(match: re.Match[str]) -> str:
        flag, text, number = flags[match[1]], match[2], match[3]
        return f"{flag} {shlex.quote(text) if text is not None else number}" if number != "True" else flag

    message = re.sub(rf"(?<![\w.'\"-])({names})=(?:'([^'\n]*)'|(\d[\w.]*|True\b))", as_typed, message)
    # A name that is also an English word stands for the option only before these.
    follows = r"(?= (?:to be|of at|from|as|with|without|or|and)\b| in \[)"
    plain = "|".join(name if "_" in name else name + follows for name in flags)
    return re.sub(rf"(?<=expected )({plain})(?!\w)", lambda match: flags[match[1]], message)


def longest(spellings: Sequence[str]) -> str:
    """Return the spelling of an option that says most, such as ``--quiet`` among it and ``-q``."""
    return max(spellings, key=len)


def _is_typed(value: object) -> bool:
    return isinstance(value, (str, list, tuple)) and value != ()  # Click has a sentinel for what is absent


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _metavar(param: click.Parameter) -> str:
    return (param.metavar or param.name or "").upper().strip("[].")
