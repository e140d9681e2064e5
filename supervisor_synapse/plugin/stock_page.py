"""Links supervisord's own page with ours.

`StatusView.render` is wrapped, once for the process, and its text gets one button more beside
those that are there. A page that looks otherwise, as Supvisors' does, stays as it is.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from supervisor.web import StatusView

_MARK = "_links_to_synapse"
_BUTTONS = re.compile(r'(<ul [^>]*\bid="buttons"[^>]*>.*?)(</ul>)', re.DOTALL)
_BUTTON = '<li class="action-button"><a href="synapse.html">Models</a></li>'


def install() -> None:
    """Link from now on; to say so twice is no error."""
    if _MARK in vars(StatusView):
        return
    render = StatusView.render

    @functools.wraps(render)
    def linked(self: Any) -> Any:
        return with_link(render(self))

    StatusView.render = linked
    setattr(StatusView, _MARK, True)


def with_link(page: Any) -> Any:
    """The page with a button that leads to ours; anything else unchanged."""
    if not isinstance(page, str):
        return page  # it is not done yet
    return _BUTTONS.sub(lambda found: f"{found[1]}{_BUTTON}{found[2]}", page, count=1)
