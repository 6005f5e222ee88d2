"""Every error that the library raises on purpose.

    FineLIPError
    ├── InputError (ValueError)      an invalid argument: what was expected, what was given, what to do
    │   └── ImageError               one picture that cannot be read; names the file
    ├── ConfigError (ValueError)     a model or training configuration that cannot be honoured
    ├── CheckpointError              a file that is not a checkpoint, or not the expected one
    ├── KernelError (RuntimeError)   a kernel that was requested by name and cannot run here
    ├── EngineError (RuntimeError)   an engine that was requested by name and cannot run here
    ├── StoreError                   an index folder that cannot be opened, read or written
    ├── WriteError (OSError)         a file that cannot be written: a full disk, a folder of someone else
    ├── ServerError                  a server that cannot be reached, refuses, or does not run this library
    └── TrainingError (RuntimeError) a run that cannot continue

Catch :class:`FineLIPError` to catch them all. The warnings that a server's client also issues are defined here, too:
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
    """A checkpoint is missing, has an unknown layout, or does not fit."""


class KernelError(FineLIPError, RuntimeError):
    """A kernel was requested by name and cannot run on this machine or on these inputs."""


class EngineError(FineLIPError, RuntimeError):
    """An engine was requested by name and cannot run on this machine."""


class StoreError(FineLIPError):
    """An index folder cannot be opened, read or written."""


class WriteError(FineLIPError, OSError):
    """A file cannot be written; the message says which and why. An existing file stays unchanged."""

    def __str__(self) -> str:
        return str(self.args[-1])


class ServerError(FineLIPError):
    """A server cannot be reached, refuses, fails, or does not run this library.

    Attributes:
        status: HTTP status of the response; None if there was none.
        code: Error code in the response, if it has one.
        request_id: Id of the request in the server's log.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


class TrainingError(FineLIPError, RuntimeError):
    """A training run cannot continue."""


class TruncationWarning(UserWarning):
    """Some captions of a call were longer than the context and lost their ends."""


class PartialAnswerWarning(UserWarning):
    """Some of a server's shards did not answer; the hits are those of the others."""
