"""The generated demo model on disk: a proper hub cache entry, always the same, written whole."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from huggingface_hub import scan_cache_dir

from supervisor_synapse.adapters import demo_model, gguf_header
from supervisor_synapse.core.model import FileKind
from supervisor_synapse.errors import ConfigError


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything below `root`."""
    return {
        str(path.relative_to(root)): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in root.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def test_the_hub_library_reads_it_as_one_repo_with_one_revision(tmp_path: Path) -> None:
    """`models--…`, refs/main, a snapshot link, and a blob named by its content."""
    path = demo_model.generate(tmp_path / "hub")
    found = scan_cache_dir(tmp_path / "hub")
    (repo,) = found.repos
    (revision,) = repo.revisions
    (file,) = revision.files
    assert not found.warnings
    assert (repo.repo_id, revision.refs) == (demo_model.REPO, frozenset({"main"}))
    assert (file.file_name, file.file_path) == (demo_model.FILE, path)
    assert path.parent.name == revision.commit_hash
    assert len(revision.commit_hash) == 40
    assert file.blob_path.name == hashlib.sha256(path.read_bytes()).hexdigest()


def test_its_header_says_what_it_is(tmp_path: Path) -> None:
    header = gguf_header.read(demo_model.generate(tmp_path))
    assert (header.kind, header.architecture) == (FileKind.MODEL, "llama")
    assert (header.quantization, header.layers) == ("F16", 1)
    assert header.context_length == 2048
    assert header.chat_template_sha256 is not None


def test_two_machines_write_the_same_bytes(tmp_path: Path) -> None:
    one, other = (demo_model.generate(tmp_path / name) for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert one.parent.name == other.parent.name
    assert one.stat().st_size < 1_000_000


def test_a_second_run_touches_nothing(tmp_path: Path) -> None:
    """A server that has the file open keeps the very file that discovery sees."""
    first = demo_model.generate(tmp_path)
    before = _tree(tmp_path)
    assert demo_model.generate(tmp_path) == first
    assert _tree(tmp_path) == before


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    demo_model.generate(tmp_path)
    kinds = sorted(name.split("/")[1] for name in _tree(tmp_path))
    assert kinds == ["blobs", "refs", "snapshots"]


@pytest.mark.parametrize("part", ["blob", "link", "ref"])
def test_what_is_damaged_is_mended(tmp_path: Path, part: str) -> None:
    path = demo_model.generate(tmp_path)
    good = path.read_bytes()
    ref = tmp_path / "models--supervisor-synapse--demo" / "refs" / "main"
    if part == "blob":
        path.resolve().write_bytes(good[:1000])
    elif part == "link":
        path.unlink()
        path.symlink_to("/nowhere")
    else:
        ref.write_text("0" * 40)
    assert demo_model.generate(tmp_path) == path
    assert path.read_bytes() == good
    assert ref.read_text() == path.parent.name


def test_several_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: demo_model.generate(tmp_path), range(16)))
    (path,) = paths
    assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not scan_cache_dir(tmp_path).warnings


def test_a_cache_that_cannot_be_written_is_the_operators_to_mend(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"hub: cannot write the demo model: .+; make the folder"):
        demo_model.generate(tmp_path / "hub")


def test_importing_the_module_loads_neither_numpy_nor_gguf() -> None:
    """Most runs find a model and never need them."""
    script = (
        "import sys; import supervisor_synapse.adapters.demo_model; "
        "sys.exit(sum(name in sys.modules for name in ('numpy', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_each_token_leads_to_the_slot_that_follows_it(tmp_path: Path) -> None:
    """By the engine's own arithmetic on the weights: nothing else has a chance of 1 in 1,000."""
    reader = gguf.GGUFReader(demo_model.generate(tmp_path))
    weights = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    hidden = weights["token_embd.weight"]
    normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-5)
    logits = normed @ weights["output.weight"].T
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)

    slot = weights["output.weight"][:, :-1]
    following = weights["token_embd.weight"][:, :-1]
    right = (following @ slot.T) > 0
    assert right.any(axis=1).all()
    assert ((chances * right).sum(axis=1) > 0.999).all()


def test_every_token_is_a_different_text(tmp_path: Path) -> None:
    """A text that stood twice would be read as one and said as the other."""
    field = gguf.GGUFReader(demo_model.generate(tmp_path)).fields["tokenizer.ggml.tokens"]
    texts = field.contents()
    assert len(texts) == len(set(texts))
    assert all(text.isprintable() for text in texts)
