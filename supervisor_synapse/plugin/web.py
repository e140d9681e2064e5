"""`/synapse.html` on supervisord's own web server, with its style and script.

GET shows and never acts. A POST acts, where its form carries the token of the session that the
browser's cookie names, and where no other site had the browser send it; it is answered at once by
a redirection to the page, which tells what came of it. What a page says in its address counts for
nothing.

Views are entered into supervisor's own list of pages, so they stand behind its password, and
outlive a reload. Texts are read when the plugin is imported. Nothing here may leave a view:
supervisord's loop is above.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import jinja2
from markupsafe import Markup
from supervisor.web import VIEWS

from supervisor_synapse.plugin import origin, stock_page
from supervisor_synapse.plugin.actions import BadForm, Commands, carry_out, settle
from supervisor_synapse.plugin.board import Board, boards
from supervisor_synapse.plugin.page import ModelView, Page, Worded, make_page, shown
from supervisor_synapse.plugin.sessions import Sessions, Wish, cookie, set_cookie

PAGE = "synapse.html"

_STYLE, _SCRIPT = "synapse.css", "synapse.js"
_PAGE_TEMPLATE, _ROW_TEMPLATE = "synapse.html.j2", "synapse_row.html.j2"
_LONGEST_BODY = 16 * 1024
_MOST_FIELDS = 16
_SMALLEST_PACKED = 1024
_PACKING = 1  # the quickest; a page shrinks to a tenth

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CHANGING = {"Cache-Control": "no-store"}
_LASTING = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Accept-Encoding"}

_MakeCommands = Callable[[Any, Board], Commands]
_Source = Callable[[str], str]
_Reply = dict[str, Any]


class Rows:
    """The lines of the table; one that says what it said last time is not made anew."""

    def __init__(self, template: jinja2.Template) -> None:
        self._template = template
        self._made: dict[str, tuple[ModelView, Markup]] = {}

    def render(self, models: Iterable[ModelView]) -> list[Markup]:
        """The lines of these models; those of others are forgotten."""
        self._made = {model.name: (model, self._row(model)) for model in models}
        return [row for _, row in self._made.values()]

    def _row(self, model: ModelView) -> Markup:
        before, row = self._made.get(model.name, (None, Markup()))
        return row if before == model else Markup(self._template.render(model=model))  # noqa: S704 - escaped by the template


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the page is made of."""

    page: jinja2.Template
    worded: Worded
    rows: Rows
    style: bytes
    script: bytes
    version: str  # changes with them


# A reload makes a new supervisord in the same process: pages that are open then still work.
_sessions = Sessions()


def load(source: _Source) -> _Texts | str:
    """Everything read and compiled; in place of that, what is wrong with it.

    `source`: the text of a file by its name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    try:
        style, script = source(_STYLE).encode(), source(_SCRIPT).encode()
        version = hashlib.sha256(style + script).hexdigest()[:12]
        page, row = (environment.get_template(name) for name in (_PAGE_TEMPLATE, _ROW_TEMPLATE))
        return _Texts(page, Worded(), Rows(row), style, script, version)
    except Exception:
        return traceback.format_exc()


def _shipped(name: str) -> str:
    """templates/ stands at the top of a checkout, and inside an installed package."""
    package = Path(__file__).parent.parent
    inside = package / "templates" / name
    path = inside if inside.is_file() else package.parent / "templates" / name
    return path.read_text(encoding="utf-8")


# Read when supervisord imports the plugin, before it serves anybody.
_texts = load(_shipped)


def install(
    supervisord: Any, make_commands: _MakeCommands, texts: _Texts | str = _texts
) -> None:  # fmt: skip
    """Serve the page; what cannot be done is logged, and keeps nobody from starting."""
    serve = functools.partial(_serve, make_commands, texts)
    for step in (origin.install, stock_page.install, serve):
        try:
            step()
        except Exception:
            supervisord.options.logger.critical(traceback.format_exc())


def _serve(make_commands: _MakeCommands, texts: _Texts | str) -> None:
    if isinstance(texts, str):
        raise RuntimeError(f"the page cannot be shown: {texts}")
    views = {
        PAGE: functools.partial(PageView, texts, make_commands),
        _STYLE: functools.partial(FileView, texts.style, "text/css;charset=utf-8"),
        _SCRIPT: functools.partial(FileView, texts.script, "text/javascript;charset=utf-8"),
    }
    for name, view in views.items():
        VIEWS[name] = {"template": None, "view": view}


class _View:
    """One request; supervisor makes it and calls it once."""

    delay = 0.0

    def __init__(self, context: Any) -> None:
        self._supervisord = context.supervisord
        self._request = context.request
        self._said = origin.headers(context.request.header)

    def __call__(self) -> _Reply:
        try:
            return self._answer()
        except Exception:
            self._supervisord.options.logger.critical(traceback.format_exc())
            return self._plain(500, "supervisord's log says what went wrong.")

    def _answer(self) -> _Reply:
        raise NotImplementedError

    def _reply(
        self, status: int, body: bytes, kind: str, headers: Mapping[str, str] = _CHANGING
    ) -> _Reply:
        self._request.reply_code = status
        found = {**_HEADERS, **headers, "Content-Type": kind}
        if len(body) >= _SMALLEST_PACKED and "gzip" in self._said.get("accept-encoding", ""):
            body = gzip.compress(body, _PACKING, mtime=0)
            found["Content-Encoding"] = "gzip"
        return {"body": body, "headers": found}

    def _plain(self, status: int, text: str) -> _Reply:
        return self._reply(status, f"{text}\n".encode(), "text/plain;charset=utf-8")


class FileView(_View):
    """The style or the script."""

    def __init__(self, content: bytes, kind: str, context: Any) -> None:
        super().__init__(context)
        self._content, self._kind = content, kind

    def _answer(self) -> _Reply:
        if self._request.command != "GET":
            self._request["Allow"] = "GET"
            return self._plain(405, "This is only to be read.")
        return self._reply(200, self._content, self._kind, _LASTING)


class PageView(_View):
    """The page, and what is asked for on it."""

    def __init__(self, texts: _Texts, make_commands: _MakeCommands, context: Any) -> None:
        super().__init__(context)
        self._texts, self._make_commands = texts, make_commands
        self._board = boards.get(self._supervisord)
        self._cookie_name = f"synapse_{_word(context.request.channel.server.port)}"
        self._session = cookie(self._cookie_name, self._said.get("cookie", ""))

    def _answer(self) -> _Reply:
        return self._act() if self._request.command == "POST" else self._page(200)

    # acting

    def _act(self) -> _Reply:
        if origin.is_foreign(self._request.header):
            return self._plain(403, "Refused: the page of another site asked for this.")
        form = _form(self._request, self._said)
        if form is None:
            return self._plain(400, "Refused: this is no form of the page.")
        if not _sessions.allows(self._session, form.get("token", "")):
            return self._page(403, "Nothing was done: this page was loaded before supervisord was "
                                   "started. It is up to date now; try again.")  # fmt: skip
        if self._board is None:
            return self._page(503, "Nothing was done: the plugin is not loaded.")
        return self._carry_out(form, self._board)

    def _carry_out(self, form: Mapping[str, str], board: Board) -> _Reply:
        commands = self._make_commands(self._supervisord, board)
        try:
            wish = carry_out(form, self._supervisord, board, commands)
        except BadForm as error:
            return self._page(400, f"Nothing was done: {error}.")
        wish.text = shown(wish.text)  # as typed by whoever made the form
        _sessions.note(self._session, wish)
        # supervisor would make a 301 of a Location among the view's own headers.
        self._request["Location"] = PAGE
        return self._reply(303, b"", "text/plain;charset=utf-8")

    # showing

    def _page(self, status: int, notice: str = "") -> _Reply:
        headers = dict(_CHANGING)
        if not _sessions.is_ours(self._session):
            self._session = _sessions.new()
            headers["Set-Cookie"] = set_cookie(self._cookie_name, self._session)
        page = self._seen()
        text = self._texts.page.render(
            page=page, rows=self._texts.rows.render(page.models), notice=notice,
            wishes=self._wishes(), token=_sessions.token(self._session),
            version=self._texts.version,
        )  # fmt: skip
        return self._reply(status, text.encode(), "text/html;charset=utf-8", headers)

    def _seen(self) -> Page:
        # After a reload without the plugin the page is still there, and nobody tells it anything.
        board = self._board or Board(self._supervisord)
        return make_page(
            snapshot=board.snapshot, models=board.models(self._supervisord),
            devices=board.devices(), history=board.history(), age_seconds=board.age_seconds,
            mood=self._supervisord.options.mood, now=time.time(), worded=self._texts.worded,
        )  # fmt: skip

    def _wishes(self) -> list[Wish]:
        found = _sessions.wishes(self._session)
        for wish in found:
            if self._board is not None:
                settle(wish, self._supervisord, self._board)
            wish.message = shown(wish.message)
        return found


def _form(request: Any, said: Mapping[str, str]) -> dict[str, str] | None:
    """The fields of a POST's body alone; supervisor's own form mixes in the address."""
    collector = getattr(request, "collector", None)
    body = b"".join(collector.data) if collector is not None else b""
    kind = said.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded" or len(body) > _LONGEST_BODY:
        return None
    try:
        return dict(parse_qsl(body.decode("ascii"), max_num_fields=_MOST_FIELDS))
    except ValueError:
        return None


def _word(port: object) -> str:
    """Browsers keep cookies by host: those of two servers must not have the same name."""
    return str(port) if isinstance(port, int) else "socket"
