"""HTML pages from the templates in ``data/pages``: one stylesheet, scripts in separate files, no external resources.

Captions, names and ids are shown, and never act as markup: every value is escaped, and
:func:`finelip_fast._markup.visible` makes invisible characters visible.
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
    """Render a page as text.

    Args:
        template: Name of a file in ``data/pages``.
        values: Values of the template's variables.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> Environment:
    """The environment of the templates: every value is escaped, and every missing one is an error."""
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
    """The content of one of the package's own stylesheets or scripts, unescaped."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
