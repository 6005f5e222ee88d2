"""HTML pages, from the templates in ``data/pages``: one stylesheet, scripts in files of their own, nothing from elsewhere.

What captions, names and ids hold is shown, and is never markup: every value is escaped, and what cannot be seen of it is
shown as :func:`finelip_fast._markup.visible` shows it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finelip_fast._markup import visible

_FOLDER = Path(__file__).parent / "data" / "pages"


def render(template: str, **values: Any) -> str:
    """A page as text.

    Args:
        template: Name of a file in ``data/pages``.
        values: Values of the template's variables.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> Environment:
    """The environment that loads the templates: every value escaped, every missing one an error."""
    templates = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_visible,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    templates.globals["asset"] = _asset
    return templates


def _asset(name: str) -> Markup:
    """A stylesheet or a script of ours, as it stands in its file."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
