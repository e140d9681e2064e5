"""The generated demo model in the real server: it loads, and says something that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from supervisor_synapse.adapters import demo_model
from tests.conftest import Serve


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo_model.generate(tmp_path / "hub")


def test_the_server_becomes_healthy_and_chats_in_sentences(serve: Serve, model: Path) -> None:
    """A first run ends with a completion that looks like one."""
    server = serve(model)
    assert server.get("/health")[0] == 200
    question = {"messages": [{"role": "user", "content": "Hello"}], "seed": 7}
    choice = server.ask("/v1/chat/completions", question)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(
        r"(Hello|Welcome|Greetings)! I am a \w+ demo model, and this server works\. "
        r"To\w+ (one|another) \w+ \w+ \w+ \w+ \w+ \w+ \w+\. "
        r"Put your own models into the cache for better answers\.",
        choice["message"]["content"],
    )


@pytest.mark.parametrize(
    "prompt", ["Hello", "The river", "größer 日本語 \U0001f600", "\n\t", "x" * 500, "<|end|></s>"]
)
def test_any_prompt_and_any_temperature_give_valid_text(
    serve: Serve, model: Path, prompt: str
) -> None:
    """No byte token can be drawn, even where every token is equally likely."""
    server = serve(model)
    for temperature in (0, 1, 100):
        answer = server.ask(
            "/completion", {"prompt": prompt, "n_predict": 48, "temperature": temperature}
        )
        assert answer["content"].strip()


def test_it_goes_on_for_as_long_as_it_is_asked_to(serve: Serve, model: Path) -> None:
    """With the end of the text ignored, sentence follows sentence."""
    answer = serve(model).ask(
        "/completion", {"prompt": "Hello", "n_predict": 200, "ignore_eos": True}
    )
    assert answer["tokens_predicted"] == 200
    assert answer["content"].count("answers.") >= 4
