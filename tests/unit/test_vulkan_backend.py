"""The Vulkan backend: toolchain, devices, and that it changes nothing for those who don't use it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama import build as builds
from turbo_eval.llama import provenance
from turbo_eval.llama.backends import backend, cmake_options, of_libraries, vulkan_loader
from turbo_eval.llama.backends.base import Card
from turbo_eval.llama.backends.vulkan_loader import Device

VULKAN = backend("vulkan")


def device(index: int, name: str, kind: str) -> Device:
    return Device(index, name, "driver 1.0", "1.3.0", kind, 32, 8.0, ())


LISTED = (
    device(0, "Radeon RX 7900 XTX", "discrete GPU"),
    device(1, "Radeon 780M", "integrated GPU"),
    device(2, "llvmpipe", "CPU"),
)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan_loader, "devices", lambda: LISTED)
    monkeypatch.delenv("GGML_VK_VISIBLE_DEVICES", raising=False)


def test_it_is_built_alone_and_found_by_its_library() -> None:
    own = cmake_options("vulkan")
    assert (own["GGML_VULKAN"], own["GGML_CUDA"]) == ("ON", "OFF")
    assert cmake_options("cpu")["GGML_VULKAN"] == "OFF"
    assert of_libraries("libggml-base.so libggml-vulkan.so") == "vulkan"


def test_a_missing_shader_compiler_is_said_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++").symlink_to(shutil.which("c++") or "/usr/bin/c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VULKAN_SDK", raising=False)
    with pytest.raises(EnvironmentProblem, match="the Vulkan build needs glslc") as problem:
        builds.options("vulkan")
    assert "apt-get install glslc libvulkan-dev spirv-headers" in problem.value.next_step


@pytest.mark.usefixtures("listed")
def test_it_takes_the_gpus_that_ggml_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [found.index for found in vulkan_loader.visible()] == [0, 1]
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "2")
    assert [found.name for found in vulkan_loader.visible()] == ["llvmpipe"]
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "")
    assert not VULKAN.is_here()


@pytest.mark.usefixtures("listed")
def test_a_worker_is_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [share.env for share in VULKAN.shares(2, 8, None)] == [
        {"GGML_VK_VISIBLE_DEVICES": "0"},
        {"GGML_VK_VISIBLE_DEVICES": "1"},
    ]
    with pytest.raises(UsageError, match="need 3 Vulkan devices, this machine has 2"):
        VULKAN.shares(3, 8, None)
    with pytest.raises(UsageError, match="sees 2 Vulkan devices"):
        VULKAN.memory_gib(64)
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    assert VULKAN.memory_gib(64) == 8.0


@pytest.mark.usefixtures("listed")
def test_a_machine_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that another backend names is not named twice; one inside the processor is not named."""
    card = Card("Radeon RX 7900 XTX", 24.0)
    monkeypatch.setattr(
        type(backend("cuda")),
        "cards",
        lambda _: [card, card],
    )
    assert provenance._gpu() == "Radeon RX 7900 XTX, Radeon RX 7900 XTX"
    monkeypatch.setattr(type(backend("cuda")), "cards", lambda _: [])
    assert provenance._gpu() == "Radeon RX 7900 XTX"
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "1,2")
    assert provenance._gpu() == ""


@pytest.mark.usefixtures("listed")
def test_doctor_shows_each_device_and_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    said = VULKAN.needs()["Vulkan device"]()
    assert "0: Radeon RX 7900 XTX (discrete GPU, driver 1.0, Vulkan 1.3.0, subgroups of 32" in said
    monkeypatch.setattr(vulkan_loader, "devices", lambda: LISTED[2:])
    assert "none is taken unless GGML_VK_VISIBLE_DEVICES names it" in VULKAN.needs()["Vulkan device"]()
    monkeypatch.setattr(vulkan_loader, "devices", tuple)
    with pytest.raises(EnvironmentProblem, match="no Vulkan driver lists a device"):
        VULKAN.needs()["Vulkan device"]()


def test_the_loader_of_this_machine_can_be_asked() -> None:
    """Whatever it lists: each has a name, a driver and a version, numbered in order."""
    found = vulkan_loader.devices()
    assert [one.index for one in found] == list(range(len(found)))
    assert all(one.name and one.driver and one.api.count(".") == 2 and one.subgroup for one in found)
