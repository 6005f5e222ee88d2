"""Every error that the library raises on purpose.

    FineLIPError
    ├── InputError (ValueError)      an argument: what was expected, what came, what to do
    │   └── ImageError               one picture that cannot be read; names the file
    ├── ConfigError (ValueError)     a model or training configuration that cannot be honoured
    ├── CheckpointError              a file that is no checkpoint, or not this one
    ├── KernelError (RuntimeError)   a kernel that was asked for by name and cannot run here
    ├── EngineError (RuntimeError)   an engine that was asked for by name and cannot run here
    ├── StoreError                   an index folder that cannot be opened, read or written
    ├── WriteError (OSError)         a file that cannot be written: a full disk, a folder of someone else
    ├── ServerError                  a server that cannot be reached, that refuses, or that is none of this library
    └── TrainingError (RuntimeError) a run that cannot go on

Catch :class:`FineLIPError` to catch them all. Warnings that a server's client gives, too, are here as well:
:class:`TruncationWarning` and :class:`PartialAnswerWarning`.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "FineLIPError",
    "ImageError",
    "InputError",
    "KernelError",
    "PartialAnswerWarning",
    "ServerError",
    "StoreError",
    "TrainingError",
    "TruncationWarning",
    "WriteError",
]


class FineLIPError(Exception):
    """Base of all errors of this library."""


class InputError(FineLIPError, ValueError):
    """An argument is not what the function takes."""


class ImageError(InputError):
    """One picture cannot be read."""


class ConfigError(FineLIPError, ValueError):
    """A model or training configuration is inconsistent or cannot be honoured here."""


class CheckpointError(FineLIPError):
    """A checkpoint is missing, of an unknown layout, or does not fit."""


class KernelError(FineLIPError, RuntimeError):
    """A kernel was asked for by name and cannot run on this machine or on these inputs."""


class EngineError(FineLIPError, RuntimeError):
    """An engine was asked for by name and cannot run on this machine."""


class StoreError(FineLIPError):
    """An index folder cannot be opened, read or written."""


class WriteError(FineLIPError, OSError):
    """A file cannot be written. Says which and why; what was there before is what it was."""

    def __str__(self) -> str:
        return str(self.args[-1])


class ServerError(FineLIPError):
    """A server cannot be reached, refuses, fails, or is none of this library.

    Attributes:
        status: HTTP status of the answer; None: there was none.
        code: Word that the server has for what went wrong, if it said so.
        request_id: Id of the request in the server's log.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


class TrainingError(FineLIPError, RuntimeError):
    """A training run cannot go on."""


class TruncationWarning(UserWarning):
    """Some captions of a call were longer than the context and lost their ends."""


class PartialAnswerWarning(UserWarning):
    """A server's shards did not all answer: hits are those of the others."""
