"""What tests of several modules need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from supervisor import web as stock
from supervisor.xmlrpc import supervisor_xmlrpc_handler


@pytest.fixture
def supervisor_as_it_was() -> Iterator[None]:
    """Each test begins and ends with supervisor's own handlers and pages."""
    views = dict(stock.VIEWS)
    kept = [
        (owner, name, vars(owner)[name])
        for owner, name in (
            (stock.supervisor_ui_handler, "continue_request"),
            (supervisor_xmlrpc_handler, "continue_request"),
            (stock.StatusView, "render"),
        )
    ]
    before = [set(vars(owner)) for owner, _, _ in kept]
    yield
    for (owner, name, value), names in zip(kept, before, strict=True):
        setattr(owner, name, value)
        for added in set(vars(owner)) - names:
            delattr(owner, added)
    stock.VIEWS.clear()
    stock.VIEWS.update(views)
