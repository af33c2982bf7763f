"""Which cache `serve` takes, what it says where none can be named, and the line it prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden import World, world
from tests.support.harness import one_sentence
from tests.support.inside import call
from tests.support.records import make_kld, make_record
from turbo_eval.inputs.kv_profile import ModelShape, Profile, write_profile
from turbo_eval.llama.provenance import machine
from turbo_eval.records.cell import CellProfile
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store


@pytest.fixture
def place() -> Iterator[World]:
    with world() as made:
        yield made


def serve(place: World, *args: str, records: tuple[Record, ...] = ()) -> tuple[int, str, str]:
    root = place.folder / "results"
    store = Store(root, machine().id)
    for record in records:
        store.write(record)
    return call("serve", place.model, "--dry-run", "--bin-dir", place.bin, "--results", root, *args)


def measured(place: World, **kld: float) -> tuple[Record, ...]:
    """One KL record a pair ("turbo3" stands for turbo3:turbo3)."""
    pairs = {name.replace("_over_", ":").replace("q80", "q8_0"): value for name, value in kld.items()}
    return tuple(
        make_record(pair if ":" in pair else f"{pair}:{pair}", 10.0, kld=make_kld(value), **place.shared())
        for pair, value in pairs.items()
    )


def test_the_smallest_within_the_bound(place: World) -> None:
    records = measured(place, turbo3=0.2, turbo4=0.03, q80=0.001)
    code, out, err = serve(place, "--max-kld", "0.05", "--ctx", "2048", "--", "-np", "2", records=records)
    assert code == 0, err
    assert out.strip().startswith(f"llama-server -m {place.model} -c 2048 -fa on -ctk turbo4 -ctv turbo4")
    assert out.strip().endswith("--port 8080 -np 2")  # as given, behind ours


def test_a_profile_on_record_is_served_by_its_file(place: World, tmp_path: Path) -> None:
    (record,) = measured(place, turbo3=0.02)
    content = CellProfile(sha256="0" * 64, types_k="turbo3", types_v="turbo3", bits_k=3.25, bits_v=3.25)
    cell = record.cell.model_copy(update={"k": "mixed", "v": "3.25", "profile": content})
    run = record.run.model_copy(update={"argv": ("x", "--kv-profile", str(tmp_path / "p.gguf"))})
    record = record.model_copy(update={"key": cell.key(), "cell": cell, "run": run})
    code, out, err = serve(place, "--max-kld", "0.05", records=(record,))
    assert code == 0, err
    assert f"--kv-profile {tmp_path / 'p.gguf'}" in out and "-ctk" not in out


def test_a_port_of_the_servers_own_options(place: World) -> None:
    _, out, _ = serve(place, "--pair", "q8_0:turbo3", "--port", "9000")
    assert "-ctk q8_0 -ctv turbo3" in out and "--port 9000" in out
    _, out, _ = serve(place, "--pair", "q8_0", "--", "--port", "9001")
    assert "--port 9001" in out and "8080" not in out


def test_nothing_on_record_names_the_command_that_measures(place: World) -> None:
    code, out, err = serve(place, "--max-kld", "0.05")
    assert (code, out) == (3, "") and one_sentence(err)
    assert f"`turbo-eval recommend {place.model} --max-kld 0.05`" in err and "--pair K:V" in err


def test_what_was_not_measured_decides_nothing(place: World) -> None:
    """Perplexities on record, a divergence asked for."""
    code, out, err = serve(
        place, "--max-kld", "0.05", records=(make_record("turbo3:turbo3", 10.1, **place.shared()),)
    )
    assert (code, out) == (3, "") and one_sentence(err) and "turbo-eval recommend" in err


def test_none_within_the_bound_names_the_nearest(place: World) -> None:
    records = measured(place, turbo3=0.2, turbo4=0.03)
    code, out, err = serve(place, "--max-kld", "0.001", records=records)
    assert (code, out) == (1, "") and one_sentence(err)
    assert "turbo4/turbo4" in err and "0.0300" in err


def test_too_close_to_tell_is_incomplete(place: World) -> None:
    records = measured(place, turbo4=0.0495)  # ± 0.0025
    code, out, err = serve(place, "--max-kld", "0.05", records=records)
    assert (code, out) == (3, "") and one_sentence(err) and "more" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--pair", "q8_0:turbo3", "--max-kld", "0.1"], 2, "give one of them"),
        (["--pair", "turbo9"], 2, "unknown cache type 'turbo9'"),
        (["--max-kld", "nan"], 2, "--max-kld"),
        (["--profile", "/nowhere.gguf"], 2, "is no KV profile"),
        (["--port", "0"], 2, "--port"),
    ],
)
def test_refused_in_a_sentence(place: World, args: list[str], code: int, words: str) -> None:
    got, out, err = serve(place, *args)
    assert (got, out) == (code, "") and one_sentence(err) and words in err, err


def test_a_profile(place: World, tmp_path: Path) -> None:
    path = tmp_path / "p.gguf"
    profile = Profile(["turbo3"] * 2, ["turbo3"] * 2, 128, 4, held_out=0.0123)
    write_profile(profile, ModelShape("llama", 10, 0, 2), path)
    code, out, err = serve(place, "--profile", str(path))
    assert code == 0, err
    assert f"--kv-profile {path}" in out and "-ctk" not in out
    code, out, err = serve(place, "--profile", str(place.model))
    assert code == 2 and "it has no types" in err
