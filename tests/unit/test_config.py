"""synapse.conf: every error is found at once and says where, what, and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse import config
from supervisor_synapse.core.model import Phase, Tier
from supervisor_synapse.core.settings import Enable, Reserve, Settings, WhenFull
from supervisor_synapse.errors import ConfigError
from supervisor_synapse.render import shipped_settings

MIB = 1024 * 1024


def problems(text: str) -> list[str]:
    """What is wrong with `text`."""
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    return caught.value.problems


def problem(text: str) -> str:
    (only,) = problems(text)
    return only


# --- what is right ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "; nothing\n", "[synapse]\n", "[synapse]\n\n[probe]\n"])
def test_nothing_said_gives_the_defaults(text: str) -> None:
    assert config.parse(text) == Settings()


def test_a_missing_file_gives_the_defaults(tmp_path: Path) -> None:
    assert config.load(tmp_path / "none.conf") == Settings()


def test_the_shipped_file_is_read_as_the_defaults() -> None:
    assert config.parse(shipped_settings()) == Settings()


def test_every_line_of_the_shipped_file_shows_the_default() -> None:
    """It says so in its first line; the example section for a model is the one exception."""
    general, _, example = shipped_settings().partition(";[model:")
    uncommented = re.sub(r"^;(?=[a-z_]+ =)", "", general, flags=re.MULTILINE)
    assert uncommented.count("\n;") < general.count("\n;") / 2
    assert config.parse(uncommented) == Settings()
    lines = re.sub(r"^;", "", f";[model:{example}", flags=re.MULTILINE)
    (rule,) = config.parse(lines).models
    assert rule.glob == "qwen*-q4_k_m"
    assert rule.settings.args == ("--flash-attn", "on")


SAID = [
    ("[synapse]\nengine = /opt/llama-server", "engine", "/opt/llama-server"),
    ("[synapse]\nengine = ~/llama-server", "engine", "~/llama-server"),
    ("[synapse]\nrpc =", "rpc", ()),
    ("[synapse]\nrpc = 127.0.0.1:50052", "rpc", ("127.0.0.1:50052",)),
    (
        "[synapse]\nrpc = gpu-box.lan:1, 10.0.0.7:00700,\n localhost:9",
        "rpc",
        ("gpu-box.lan:1", "10.0.0.7:700", "localhost:9"),
    ),
    ("[synapse]\nhost = localhost", "host", "127.0.0.1"),
    ("[synapse]\nhost = ::1", "host", "::1"),
    ("[synapse]\nenable = none", "enable", Enable.NONE),
    ("[synapse]\nmax_parallel = 7 ; at once", "max_parallel", 7),
    ("[synapse]\nmax_parallel = 7 # at once", "max_parallel", 7),
    ("[synapse]\nMax_Parallel: 7", "max_parallel", 7),
    ("[synapse]\nmemory_reserve = 2GiB", "memory_reserve", Reserve(2048 * MIB)),
    ("[synapse]\nmemory_reserve = 1.5 gib", "memory_reserve", Reserve(1536 * MIB)),
    ("[synapse]\nmemory_reserve = 1000", "memory_reserve", Reserve(1000)),
    ("[synapse]\nmemory_reserve = 5MB", "memory_reserve", Reserve(5_000_000)),
    ("[synapse]\nmemory_reserve = 12.5%", "memory_reserve", Reserve(0, 0.125)),
    ("[synapse]\nwhen_full = wait", "when_full", WhenFull.WAIT),
    ("[synapse]\nport_range = 9000 - 9000", "first_port", 9000),
    ("[synapse]\nmodel_dirs = /a, /b c\n /d", "model_dirs", ("/a", "/b c", "/d")),
    ("[synapse]\ncache_dirs =", "cache_dirs", ()),
]


@pytest.mark.parametrize(("text", "key", "value"), SAID)
def test_what_is_said_is_taken(text: str, key: str, value: object) -> None:
    assert getattr(config.parse(text), key) == value


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config.parse("[synapse]\nmodel_dirs = ~/m").model_dirs == ("/home/someone/m",)


def test_policies_are_taken_section_by_section() -> None:
    said = config.parse(
        "[probe]\nstall_seconds = 60\n[restart]\nbackoff_factor = 1.5\n[stop]\ndrain_seconds = 0\n"
    )
    assert (said.probe.stall_seconds, said.probe.period_seconds) == (60, 5)
    assert (said.restart.backoff_factor, said.restart.intensity) == (1.5, 5)
    assert (said.stop.drain_seconds, said.stop.term_seconds) == (0, 2)


NOTIFY = [
    ("command = /opt/hook --to 'a b'", "command", ("/opt/hook", "--to", "a b")),
    ("command = ~/hook", "command", ("/home/someone/hook",)),
    ("url = HTTPS://example.org:8443/x?y=z", "url", "HTTPS://example.org:8443/x?y=z"),
    ("url_header_file = ~/keys", "url_header_file", "/home/someone/keys"),
    ("events = Ready, backoff", "phases", (Phase.READY, Phase.BACKOFF)),
    ("events = ready", "failures", False),
    ("events = failure", "failures", True),
    ("events = all", "phases", tuple(Phase)),
    ("events = all", "failures", True),
    ("events =", "phases", ()),
    ("models = qwen*, a-[12] b", "models", ("qwen*", "a-[12]", "b")),
    ("most_per_minute = 1", "most_per_minute", 1),
]


@pytest.mark.parametrize(("line", "key", "value"), NOTIFY)
def test_who_is_told_and_of_what_is_taken(
    line: str, key: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert getattr(config.parse(f"[notify]\n{line}\n").notify, key) == value


@pytest.mark.parametrize("url", ["https://example.org/x", "http://127.0.0.1:9/x", "http://[::1]/x",
                                 "http://localhost/x"])  # fmt: skip
def test_keys_go_where_nobody_can_read_them_on_the_way(url: str) -> None:
    text = f"[notify]\nurl_header_file = /keys\nurl = {url}\n"
    assert config.parse(text).notify.url == url


@pytest.mark.parametrize("host", ["example.org", "192.168.1.20", "localhost.example.org"])
def test_keys_do_not_go_in_the_clear(host: str) -> None:
    said = problem(f"[notify]\nurl_header_file = /keys\nurl = http://{host}/x\n")
    assert said == (
        "synapse.conf: [notify]: url must be https or a loopback address where url_header_file is "
        "set"
    )


@pytest.mark.parametrize(
    "line",
    [
        "url = https://you:s3cret@example.org/x", "url = https://s3cret@example.org/x",
        "url = s3cret", "url = https://example.org/#s3cret", "command = s3cret",
        "command = /opt/hook 's3cret",
    ],
)  # fmt: skip
def test_what_may_be_a_key_is_not_quoted(line: str) -> None:
    assert "s3cret" not in problem(f"[notify]\n{line}\n")


def test_a_tier_keeps_the_defaults_that_are_not_said() -> None:
    rule = config.parse("[tier:balanced]\npriority = 5\n").rule(Tier.BALANCED)
    assert (rule.priority, rule.max_parameters, rule.max_context) == (5, 15_000_000_000, 32768)


def test_a_tier_is_checked_against_its_own_defaults() -> None:
    """balanced goes up to 32768 by default, so that 20000 is a fine lower bound."""
    rule = config.parse("[tier:balanced]\nmin_context = 20000\n").rule(Tier.BALANCED)
    assert (rule.min_context, rule.max_context) == (20000, 32768)


@pytest.mark.parametrize(
    ("said", "parameters"),
    [("7B", 7 * 10**9), ("500M", 5 * 10**8), ("1.5b", 15 * 10**8), ("1T", 10**12), ("ANY", None)],
)
def test_numbers_of_parameters_have_units(said: str, parameters: int | None) -> None:
    assert config.parse_count(said) == parameters


def test_later_model_sections_win_key_by_key() -> None:
    said = config.parse(
        "[model:*]\ncontext = 4096\nparallel = 2\n[model:qwen*]\ncontext = 8192\n"
        "[model:qwen-big]\ncontext = auto\n"
    )
    assert said.for_model("llama", "o/llama/l.gguf").context == 4096
    assert said.for_model("qwen-small", "o/q/s.gguf").context == 8192
    big = said.for_model("qwen-big", "o/q/b.gguf")
    assert (big.context, big.parallel) == (None, 2)


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("tiny-q4_k_m", True), ("tiny-*", True), ("TINY-*", True), ("tiny", False),
        ("Owner/Tiny-GGUF/*", True), ("*/tiny-q[48]_k_m.gguf", True), ("other/*", False),
        ("[t]iny-*", True),
    ],
)  # fmt: skip
def test_a_section_is_for_program_names_and_for_files_in_repos(glob: str, matches: bool) -> None:
    said = config.parse(f"[model:{glob}]\nparallel = 9\n")
    found = said.for_model("tiny-q4_k_m", "Owner/Tiny-GGUF/Tiny-Q4_K_M.gguf")
    assert (found.parallel == 9) is matches


MODEL_KEYS = [
    ("enabled", "yes", True), ("enabled", "off", False), ("enabled", "auto", None),
    ("tier", "FAST", Tier.FAST), ("alias", "gpt-4o:latest", "gpt-4o:latest"),
    ("port", "8150", 8150), ("context", "auto", None), ("parallel", "1", 1),
    ("gpu_layers", "0", 0), ("gpu_layers", "auto", None), ("device", "Vulkan0,Vulkan1",
    "Vulkan0,Vulkan1"), ("fallback", "a-b_c.d", "a-b_c.d"), ("sleep_idle_seconds", "600", 600),
    ("pinned", "true", True), ("args", "--flash-attn on", ("--flash-attn", "on")),
    ("args", "--chat-template-kwargs '{\"x\":[1,2]}'", ("--chat-template-kwargs", '{"x":[1,2]}')),
    ("args", "", ()),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), MODEL_KEYS)
def test_each_key_of_a_model_section_is_parsed(key: str, text: str, value: object) -> None:
    said = config.parse(f"[model:*]\n{key} = {text}\n")
    assert getattr(said.for_model("x", "y"), key) == value
    assert said.models[0].said == {key}


# --- what is wrong -----------------------------------------------------------------------------

WRONG = [
    ("[synapse]", "engine = bin/llama", "must be auto, or a path that begins with / or ~"),
    ("[synapse]", "rpc = gpu-box", "an address such as 192.168.1.20:50052"),
    ("[synapse]", "rpc = gpu-box:0", "a port within 1-65535"),
    ("[synapse]", "rpc = gpu-box:65536", "a port within 1-65535"),
    ("[synapse]", "rpc = gpu box:50052", "a name or an IPv4 address"),
    ("[synapse]", "rpc = [::1]:50052", "a name or an IPv4 address"),
    ("[synapse]", "rpc = $(id):50052", "a name or an IPv4 address"),
    ("[synapse]", "rpc = -x:50052", "a name or an IPv4 address"),
    ("[synapse]", "rpc = é:50052", "a name or an IPv4 address"),
    ("[synapse]", "rpc = a:1, b:2, a:1", "each device once"),
    ("[synapse]", "rpc = " + ", ".join(f"a:{n}" for n in range(1, 18)), "at most 16"),
    ("[synapse]", "model_dirs = models", "absolute"),
    ("[synapse]", "port_range = 80-90", "1024-65535"),
    ("[synapse]", "port_range = 9000-8000", "8100-8199"),
    ("[synapse]", "port_range = 8100", "8100-8199"),
    ("[synapse]", "host = example.org", "127.0.0.1"),
    ("[synapse]", "enable = some", "'fit', 'all' or 'none'"),
    ("[synapse]", "max_parallel = 0", "greater than or equal to 1"),
    ("[synapse]", "max_parallel = many", "'many' is not a whole number such as 3"),
    ("[synapse]", "memory_reserve = 5 bananas", "512MiB"),
    ("[synapse]", "memory_reserve = 100%", "512MiB"),
    ("[synapse]", "memory_reserve = -1", "512MiB"),
    ("[synapse]", "when_full = panic", "'degrade', 'evict', 'wait' or 'refuse'"),
    ("[probe]", "period_seconds = 0", "greater than 0"),
    ("[probe]", "period_seconds = nan", "86400"),
    ("[probe]", "period_seconds = inf", "86400"),
    ("[probe]", "failure_threshold = 2.5", "'2.5' is not a whole number such as 3"),
    ("[probe]", "timeout_seconds = 2s", "'2s' is not a number such as 2"),
    ("[restart]", "backoff_factor = 0.5", "greater than or equal to 1"),
    ("[stop]", "term_seconds = 0", "greater than or equal to 1"),
    ("[stop]", "drain_seconds = -1", "greater than or equal to 0"),
    ("[notify]", "command = hook --x", "absolute path"),
    ("[notify]", "command = '/opt/hook", "balance its quotes"),
    ("[notify]", "command = /opt/hook a\x07b", "control characters"),
    ("[notify]", "url = ftp://example.org/x", "https://example.org/hook"),
    ("[notify]", "url = https://[::1/x", "https://example.org/hook"),
    ("[notify]", "url = https:///x", "https://example.org/hook"),
    ("[notify]", "url = https://example.org/a b", "https://example.org/hook"),
    ("[notify]", "url = https://example.org:99999/x", "1-65535"),
    ("[notify]", "url_header_file = keys", "absolute path"),
    ("[notify]", "events = failed, dead", "'dead' is no event: failure, disabled, pending"),
    ("[notify]", "most_per_minute = 0", "greater than or equal to 1"),
    ("[notify]", "timeout_seconds = 0", "greater than 0"),
    ("[tier:fast]", "max_parameters = big", "7B"),
    ("[tier:fast]", "min_context = 1", "256"),
    ("[model:x]", "enabled = perhaps", "true or false"),
    ("[model:x]", "tier = purple", "balanced"),
    ("[model:x]", "alias = a b", "must be a letter or digit, then at most 99 letters, digits and"),
    ("[model:x]", "port = 80", "1024"),
    ("[model:x]", "context = 16k", "'16k' is not a whole number such as 16384, or auto"),
    ("[model:x]", "sleep_idle_seconds = auto", "'auto' is not a whole number such as 600"),
    ("[model:x]", "gpu_layers = all", "'all' is not a whole number such as 99, or auto"),
    ("[model:x]", "parallel = 257", "256"),
    ("[model:x]", "device = CUDA0;rm", "CUDA0"),
    ("[model:x]", "fallback = A Model", "program name"),
    ("[model:x]", "args = --x 'a b'", "allowed"),
    ("[model:x]", "args = --x $(id)", "allowed"),
    ("[model:x]", "args = --x `id`", "allowed"),
    ("[model:x]", "args = --x é", "allowed"),
    ("[model:x]", 'args = "--x', "closing quotation"),
    ("[model:x]", "args = --host 0.0.0.0", "set host in [synapse]"),
    ("[model:x]", "args = --port=9", "set port here"),
    ("[model:x]", "args = -m /x.gguf", "discovery"),
    ("[model:x]", "args = --api-key k", "--api-key-file"),
]


@pytest.mark.parametrize(("section", "line", "allowed"), WRONG)
def test_an_error_names_section_key_and_what_is_allowed(
    section: str, line: str, allowed: str
) -> None:
    said = problem(f"{section}\n{line}\n")
    key = line.split("=", 1)[0].strip()
    assert said.startswith(f"synapse.conf: {section} {key}: ")
    assert allowed in said
    assert "\n" not in said
    assert not re.search("input|string|parse|pattern|integer", said, re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[synapse]\nmax_paralel = 3\n", ["[synapse] max_paralel", "did you mean max_parallel?"]),
        ("[probe]\nfoo = 3\n", ["[probe] foo", "allowed: period_seconds"]),
        ("[tier:slow]\npriority = 3\n", ["[tier:slow]", "did you mean tier:"]),
        ("[nonsense]\n", ["[nonsense]", "model:GLOB"]),
        ("[DEFAULT]\nhost = ::1\n", ["[DEFAULT]", "unknown section"]),
        ("[model:]\nenabled = true\n", ["[model:]", "name a model"]),
    ],
)
def test_what_is_unknown_is_an_error_with_a_suggestion(text: str, named: list[str]) -> None:
    said = problem(text)
    assert all(part in said for part in named), said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[restart]\nbackoff_max_seconds = 0.5\n", "backoff_initial_seconds"),
        ("[tier:fast]\nmax_context = 1024\n", "min_context"),
        ("[tier:fast]\nmax_parameters = 20B\n", "max_parameters"),
        ("[tier:fast]\nmax_parameters = any\n", "max_parameters"),
        ("[tier:powerful]\nmax_parameters = 10B\n", "max_parameters"),
    ],
)
def test_values_that_contradict_each_other_are_an_error(text: str, named: str) -> None:
    assert named in problem(text)


def test_five_errors_are_reported_at_once() -> None:
    said = problems(
        "[synapse]\nenable = some\nhost = nowhere\n[probe]\nperiod = 1\n"
        "[model:a]\nargs = --model x\n[gateway]\nport = 1\n"
    )
    assert len(said) == 5
    for part in ("enable", "host", "[probe] period", "[model:a] args", "[gateway]"):
        assert any(part in line for line in said), part


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[synapse]\nhost = ::1\nhost = ::1\n[probe]\nfoo = 1\n", ["host: given twice", "foo"]),
        ("[synapse]\n[probe]\nfoo = 1\n[synapse]\n", ["[synapse]: stands twice", "foo"]),
        (
            "[synapse]\nhost = ::1\nhost = ::1\nengine = auto\nengine = auto\n",
            ["host: given twice", "engine: given twice"],
        ),
        ("[synapse]\ngarbage\n[probe]\nfoo = 1\n", ["line 2", "foo"]),
        ("host = ::1\n[probe]\nfoo = 1\n", ["line 1", "foo"]),
    ],
    ids=["key twice", "section twice", "two keys twice", "no key", "no section"],
)
def test_a_broken_line_hides_no_other_error(text: str, named: list[str]) -> None:
    said = problems(text)
    assert all(any(part in line for line in said) for part in named), said


@pytest.mark.parametrize("args", ["--api-key s3cret", "--api-key=s3cret"])
def test_a_key_is_not_repeated_in_the_complaint(args: str) -> None:
    """The complaint goes to logs and web pages, where a key must never stand."""
    assert "s3cret" not in problem(f"[model:x]\nargs = {args}\n")


def test_the_home_of_nobody_is_an_error_like_any_other() -> None:
    assert "model_dirs" in problem("[synapse]\nmodel_dirs = ~no-such-user/models\n")


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "synapse.conf"
    path.write_text("[synapse]\nenable = some\n[x]\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert len(caught.value.problems) == 2
    assert all(line.startswith(f"{path}: [") for line in caught.value.problems)


@pytest.mark.parametrize("kind", ["folder", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "synapse.conf"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"[synapse]\nhost = \xff\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot read it")):
        config.load(path)


_LINES = st.lists(
    st.one_of(
        st.sampled_from([
            "[synapse]", "[probe]", "[tier:fast]", "[model:*]", "[", "]", "=", "host", "host = ::1",
            "args = --x %(here)s", "max_context = 1", " continued", "memory_reserve = 9" * 9,
            "[model:\x00]", "\ufeff", "cache_dirs = ~nobody-here",
        ]),
        st.text(max_size=30),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(_LINES)
def test_any_text_gives_settings_or_a_complaint(lines: list[str]) -> None:
    found: Settings | tuple[str, ...]
    try:
        found = config.parse("\n".join(lines))
    except ConfigError as error:
        found = error.problems
    assert isinstance(found, Settings) or len(found) > 0
