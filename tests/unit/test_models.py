"""GGUF headers, models and corpora by name and path; the files are written by `gguf` itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.inputs import corpora, models
from turbo_eval.inputs.corpora import resolve_corpus
from turbo_eval.inputs.gguf_info import read_gguf_info
from turbo_eval.inputs.models import resolve_model
from turbo_eval.inputs.registry import DatasetSource, Entry, acquire, parse_entries
from turbo_eval.util import paths


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(tmp_path / "cache"))


def write_gguf(
    path: Path, *, arch: str = "llama", kv_heads: int | list[int] = 2, key_length: int = 0
) -> Path:
    writer = GGUFWriter(path, arch)
    writer.add_name("toy")
    writer.add_block_count(4)
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    writer.add_head_count(8)
    writer.add_head_count_kv(kv_heads)
    if key_length:
        writer.add_key_length(key_length)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_token_list([f"token {n}" for n in range(1000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_tensor("a", np.zeros((64, 32), dtype=np.float32))
    writer.add_tensor("b", np.ones((32,), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_shape_of_a_model(tmp_path: Path) -> None:
    info = read_gguf_info(write_gguf(tmp_path / "m.gguf"))
    assert (info.arch, info.name, info.file_type) == ("llama", "toy", "MOSTLY_Q8_0")
    assert (info.n_layer, info.n_embd, info.n_head, info.n_head_kv) == (4, 256, 8, 2)
    assert (info.head_dim_k, info.head_dim_v) == (32, 32)
    assert (info.n_ctx_train, info.n_vocab, info.tensor_count) == (2048, 1000, 2)


def test_heads_that_differ_by_layer(tmp_path: Path) -> None:
    info = read_gguf_info(write_gguf(tmp_path / "m.gguf", kv_heads=[1, 2, 4, 2], key_length=128))
    assert (info.n_head_kv, info.head_dim_k, info.head_dim_v) == (4, 128, 32)


@pytest.mark.parametrize("keep", [6, 30, 5000, 26000])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    assert keep < len(whole)
    (tmp_path / "t.gguf").write_bytes(whole[:keep])
    with pytest.raises(UsageError, match="is truncated"):
        read_gguf_info(tmp_path / "t.gguf")


def test_last_byte_missing(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes().rstrip(b"\0")  # padding may be missing
    read_gguf_info(_file(tmp_path / "p.gguf", whole))
    with pytest.raises(UsageError, match="is truncated"):
        read_gguf_info(_file(tmp_path / "t.gguf", whole[:-1]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a GGUF file"),
        (b"<html>not found</html>", "is not a GGUF file: it starts with b'<htm'"),
        (b"GGUF\x01\x00\x00\x00" + b"\0" * 100, "version 1 is not supported"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 16, "has no"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "is truncated"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        resolve_model(str(_file(tmp_path / "x.gguf", content)))


def test_model_by_path_is_hashed_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    model = resolve_model(str(file))
    assert model.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (model.name, model.size) == ("m", file.stat().st_size)
    remembered = list((tmp_path / "cache" / "files").glob("*.json"))
    assert json.loads(remembered[0].read_text())["facts"]["gguf"]["n_layer"] == 4
    assert resolve_model(str(file)) == model


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model smollm2-135") as caught:
        resolve_model("smollm2-135")
    assert "perhaps you meant 'smollm2-135m'" in caught.value.next_step
    with pytest.raises(UsageError, match=r"no model file nowhere/m\.gguf"):
        resolve_model("nowhere/m.gguf")
    with pytest.raises(UsageError, match="no corpus news") as caught:
        resolve_corpus("news")
    assert "news-prose" in caught.value.next_step
    with pytest.raises(EnvironmentProblem, match="is not downloaded") as missing:
        resolve_corpus("news-prose", download=False)
    assert "corpora get news-prose" in missing.value.next_step


def test_split_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part of a split model"):
        resolve_model(str(write_gguf(tmp_path / "m-00001-of-00002.gguf")))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b"caf\xe9 au lait", "is no UTF-8 text"), (b"GGUF\0\0", "holds NUL bytes")],
)
def test_corpora_that_are_no_text(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        resolve_corpus(str(_file(tmp_path / "c.txt", content)))


def test_registries_are_sound() -> None:
    known = models.registry()
    assert {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"} <= known.keys()
    assert all(known[name].sha256 for name in known if known[name].wheel)
    assert corpora.default_name() in corpora.registry()
    assert corpora.registry()["wikitext-2"].size == 1_290_590


def test_registry_mistakes_are_named() -> None:
    file = Path("models.toml")
    with pytest.raises(UsageError, match=r"models\.toml: m\.sha: Extra inputs"):
        parse_entries(file, {"m": {"title": "", "license": "", "sha": "x"}})
    with pytest.raises(UsageError, match="exactly one of wheel, hub and dataset"):
        parse_entries(file, {"m": {"title": "", "license": ""}})


def test_dataset_rows_become_the_raw_file(tmp_path: Path) -> None:
    """Through `datasets` itself, from a data set on disk: empty rows stand for " \\n"."""
    folder = tmp_path / "toytext"
    folder.mkdir()
    rows = ["", " = Title = \n", "", " Some text @-@ here . \n"]
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    expected = b" \n = Title = \n \n Some text @-@ here . \n"
    entry = Entry(
        title="toy",
        license="none",
        sha256=hashlib.sha256(expected).hexdigest(),
        dataset=DatasetSource(path=str(folder), name="default", split="test", column="text", empty_row=" \n"),
    )
    path, digest = acquire("toy", entry, tmp_path / "out.txt")
    assert path.read_bytes() == expected
    assert digest == entry.sha256


@pytest.mark.network
def test_default_corpus_really_comes_from_the_index() -> None:
    found = resolve_corpus(corpora.default_name())
    assert found.sha256 == corpora.registry()[found.name].sha256
    assert found.path.is_relative_to(paths.cache_dir())
    assert found.path.read_text().startswith("Hundreds of people have been forced to vacate")


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
