"""Exit status and log tail → class and evidence, with what llama-server really printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.failures import PERMANENT, Ending, classify, printable
from supervisor_synapse.core.model import FailureClass

START = "synapse-run: start: pid=4711 port=8100"
LOADS = "srv    load_model: loading model '/models/tiny.gguf'"

TOLD_BY_LOG = [
    (FailureClass.PORT_IN_USE,
     "start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8100"),
    (FailureClass.MODEL_MISSING,
     "gguf_init_from_file: failed to open GGUF file '/m/a.gguf' (No such file or directory)"),
    (FailureClass.MODEL_CORRUPT, "gguf_init_from_file_impl: failed to read magic"),
    (FailureClass.MODEL_CORRUPT,
     "gguf_init_from_file_impl: invalid magic characters: 'GGML', expected 'GGUF'"),
    (FailureClass.MODEL_CORRUPT, "gguf_init_from_file_impl: failed to read key-value pairs"),
    (FailureClass.MODEL_CORRUPT,
     "gguf_init_from_file_impl: number of tensors is 4294967296 but must be in [0, 1]"),
    (FailureClass.MODEL_CORRUPT, "string length 281474976710656 exceeds maximum 1073741824"),
    (FailureClass.MODEL_CORRUPT,
     "this GGUF file is version 9 but this software only supports up to version 3"),
    (FailureClass.MODEL_CORRUPT,
     "tensor 'blk.1.ffn_up.weight' data is not within the file bounds, model is corrupted"),
    (FailureClass.BAD_ARGUMENT, "error: invalid argument: --nonsense"),
    (FailureClass.BAD_ARGUMENT, 'error while handling argument "--ctx-size": stoi'),
    (FailureClass.BAD_ARGUMENT, "error: the supplied chat template is not supported: nonsense"),
    (FailureClass.OUT_OF_MEMORY, "ggml_backend_cpu_buffer_type_alloc_buffer: insufficient memory"),
    (FailureClass.OUT_OF_MEMORY, "llama_kv_cache: failed to allocate buffer for kv cache"),
    (FailureClass.OUT_OF_MEMORY,
     "ggml_vulkan: Device memory allocation failed: vk::Device::allocateMemory: "
     "ErrorOutOfDeviceMemory"),
    (FailureClass.OUT_OF_MEMORY, "CUDA error: out of memory"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "line"), TOLD_BY_LOG)
def test_what_the_log_says_decides_whatever_follows_it(kind: FailureClass, line: str) -> None:
    """llama-server exits with 1 for nearly everything, and ends with a line that says less."""
    tail = "\n".join([START, LOADS, line, "srv    load_model: failed to load model", "exiting"])
    assert classify(Ending(1, tail)) == (kind, line)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (64, FailureClass.BAD_ARGUMENT),
        (66, FailureClass.MODEL_MISSING),
        (69, FailureClass.OUT_OF_MEMORY),
        (72, FailureClass.BAD_ARGUMENT),
        (75, FailureClass.PORT_IN_USE),
        (71, FailureClass.CRASHED),
        (0, FailureClass.CRASHED),
        (1, FailureClass.CRASHED),
        (-1, FailureClass.CRASHED),
        (128 + 9, FailureClass.CRASHED),
        (128 + 11, FailureClass.CRASHED),
        (128 + 7, FailureClass.CRASHED),
    ],
)
def test_where_the_log_does_not_say_the_status_decides(status: int, kind: FailureClass) -> None:
    found, evidence = classify(Ending(status, ""))
    assert found is kind
    assert evidence


@pytest.mark.parametrize("name", ["out of memory", "failed to read magic", "exceeds maximum"])
def test_the_launchers_refusal_is_not_read_from_a_files_name(name: str) -> None:
    """Its exit status says what it means; the line quotes what came from outside."""
    line = f"synapse-run: cannot serve '/models/{name}.gguf': not a file"
    assert classify(Ending(66, f"{START}\n{line}")) == (FailureClass.MODEL_MISSING, line)


def test_memory_refused_by_the_ledger_is_told_with_its_numbers() -> None:
    line = "synapse-run: a does not fit: needs 900 MiB on CUDA0, 300 MiB left"
    assert classify(Ending(69, f"{START}\n{line}")) == (FailureClass.OUT_OF_MEMORY, line)


def test_an_abort_without_a_word_while_loading_is_out_of_memory() -> None:
    """Seen with Vulkan: status 134, and nothing in the log."""
    assert classify(Ending(128 + 6, f"{START}\n{LOADS}"))[0] is FailureClass.OUT_OF_MEMORY


def test_an_abort_of_a_server_that_was_ready_is_a_crash() -> None:
    ending = Ending(128 + 6, f"{START}\n{LOADS}")
    assert classify(ending, was_ready=True)[0] is FailureClass.CRASHED


def test_an_abort_that_names_a_failed_assertion_is_a_crash() -> None:
    line = "/src/ggml.c:1234: GGML_ASSERT(a->ne[0] == b->ne[0]) failed"
    tail = f"{START}\n{LOADS}\n{line}\n[New LWP 12]"
    assert classify(Ending(128 + 6, tail)) == (FailureClass.CRASHED, line)


@pytest.mark.parametrize(("kind", "line"), TOLD_BY_LOG)
@pytest.mark.parametrize("status", [-1, 1, 66, 128 + 9])
def test_a_server_that_was_ready_failed_of_nothing_that_keeps_it_from_getting_ready(
    kind: FailureClass, line: str, status: int
) -> None:
    """Such a line stems from a request; taken at its word, it would bar the restart for good."""
    found, _ = classify(Ending(status, f"{START}\n{line}"), was_ready=True)
    expected = kind if kind is FailureClass.OUT_OF_MEMORY else FailureClass.CRASHED
    assert found is expected


def test_what_an_earlier_run_said_is_not_held_against_this_one() -> None:
    """The log goes on from run to run; the launcher marks where each begins."""
    tail = f"{START}\nerror: invalid argument: --x\n{START}\n{LOADS}\nsegfault at 0"
    assert classify(Ending(1, tail)) == (FailureClass.CRASHED, "segfault at 0")


def test_a_tail_that_begins_within_the_run_is_all_of_it() -> None:
    """The mark is long gone from the last 16 KiB."""
    tail = "half a line\n" + "noise\n" * 500 + "CUDA error: out of memory\n"
    assert classify(Ending(1, tail))[0] is FailureClass.OUT_OF_MEMORY


def test_the_last_of_several_lines_of_a_class_is_the_evidence() -> None:
    tail = "failed to allocate 1\nfailed to allocate 2\n"
    assert classify(Ending(1, tail)) == (FailureClass.OUT_OF_MEMORY, "failed to allocate 2")


def test_permanent_is_what_a_retry_cannot_help() -> None:
    assert {kind.value for kind in PERMANENT} == {
        "bad-argument", "model-missing", "model-corrupt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "words"),
    [(-1, "killed by a signal"), (128 + 9, "killed by signal 9"), (3, "exit status 3")],
)
def test_without_a_log_the_evidence_is_the_status_in_words(status: int, words: str) -> None:
    assert classify(Ending(status, "\n \n"))[1] == words


@given(st.integers(-1, 255), st.text(max_size=2000), st.booleans())
def test_whatever_a_server_printed_gives_a_class_and_one_safe_line(
    status: int, tail: str, was_ready: bool
) -> None:
    """Printable, not empty, not long."""
    kind, evidence = classify(Ending(status, tail), was_ready=was_ready)
    assert isinstance(kind, FailureClass)
    assert evidence
    assert evidence.isprintable()
    assert len(evidence) <= 300


def test_escapes_and_direction_marks_do_not_reach_the_evidence() -> None:
    """They could repaint a terminal, or turn a line around."""
    assert printable("a\x1b[31mred\x07\u202egnp\u2028b\tc\r") == "a [31mred gnp b c"
