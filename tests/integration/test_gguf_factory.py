"""What the factory says that loads, loads in the real server, and answers in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import gguf_factory
from tests.conftest import Serve

MODELS: dict[str, dict[str, Any]] = {
    "the default": {},
    "no chat template": {"chat_template": None},
    "a larger one": {"layers": 4, "embedding": 128, "vocabulary": 400},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3"},
    "gemma3 with a sliding window": {"architecture": "gemma3", "sliding_window": 32},
    "mixture of experts": {"architecture": "qwen3moe", "experts": 4},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_text_model_answers_in_words(
    serve: Serve, tmp_path: Path, options: dict[str, Any]
) -> None:
    server = serve(gguf_factory.write_model(tmp_path / "model.gguf", **options))
    answer = server.ask("/completion", {"prompt": "Hello", "n_predict": 32, "temperature": 2})
    known = set(gguf_factory.words(options.get("vocabulary", 96)))
    assert answer["tokens_predicted"] == 32
    assert set(answer["content"].split()) <= known


@pytest.mark.usefixtures("quantized_engine")
@pytest.mark.parametrize("tensor_type", ["Q8_0", "Q4_0"])
def test_a_quantized_model_answers_in_words(serve: Serve, tmp_path: Path, tensor_type: str) -> None:
    server = serve(gguf_factory.write_model(tmp_path / "model.gguf", tensor_type=tensor_type))
    answer = server.ask("/completion", {"prompt": "Hello", "n_predict": 8})
    assert set(answer["content"].split()) <= set(gguf_factory.words(96))


def test_a_split_model_loads_from_its_first_shard(serve: Serve, tmp_path: Path) -> None:
    first, *_ = gguf_factory.write_split(tmp_path, "model", shards=3)
    answer = serve(first).ask("/completion", {"prompt": "Hello", "n_predict": 8})
    assert len(answer["content"].split()) == 8


def test_an_embedding_model_embeds(serve: Serve, tmp_path: Path) -> None:
    server = serve(gguf_factory.write_embedding(tmp_path / "bert.gguf"), "--embeddings")
    answer = server.ask("/v1/embeddings", {"input": "the old river"})
    assert len(answer["data"][0]["embedding"]) == 64


def test_a_reranker_ranks(serve: Serve, tmp_path: Path) -> None:
    server = serve(gguf_factory.write_reranker(tmp_path / "rank.gguf"), "--reranking")
    question = {"query": "the old river", "documents": ["a bird", "the river sings"]}
    answer = server.ask("/v1/rerank", question)
    assert sorted(result["index"] for result in answer["results"]) == [0, 1]


def test_an_adapter_fits_the_default_model(serve: Serve, tmp_path: Path) -> None:
    model = gguf_factory.write_model(tmp_path / "model.gguf")
    adapter = gguf_factory.write_adapter(tmp_path / "adapter.gguf")
    server = serve(model, "--lora", str(adapter))
    assert server.ask("/completion", {"prompt": "Hello", "n_predict": 4})["content"]
