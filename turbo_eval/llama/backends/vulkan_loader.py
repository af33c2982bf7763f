"""What this machine's Vulkan loader lists: asked directly, as no tool that prints it need be installed.

Structures and constants are those of vulkan_core.h (Vulkan 1.1 and newer), read as bytes.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from ctypes import POINTER, byref, c_char_p, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache

_SONAME = {"linux": "libvulkan.so.1", "darwin": "libvulkan.1.dylib", "win32": "vulkan-1.dll"}
_API_1_1 = 1 << 22 | 1 << 12
# VkStructureType
_APPLICATION_INFO, _INSTANCE_CREATE_INFO = 0, 1
_PROPERTIES_2, _SUBGROUP_PROPERTIES, _DRIVER_PROPERTIES = 1000059001, 1000094000, 1000196000
# VkPhysicalDeviceType
_KINDS = ("other", "integrated GPU", "discrete GPU", "virtual GPU", "CPU")
_MATRIX_EXTENSIONS = {
    "VK_KHR_cooperative_matrix": "KHR_cooperative_matrix",
    "VK_NV_cooperative_matrix2": "NV_cooperative_matrix2",
}


@dataclass(frozen=True)
class Device:
    """A physical device.

    Attributes:
        index: its number in the loader's list, which GGML_VK_VISIBLE_DEVICES means.
        name, driver, api: as it says them, e.g. "Radeon RX 7900 XTX", "radv Mesa 22.3.6", "1.3.230".
        kind: "discrete GPU", "integrated GPU", "virtual GPU", "CPU" (a software renderer) or "other".
        subgroup: invocations in a subgroup.
        memory_gib: its largest heap of device-local memory.
        matrix: extensions for cooperative matrices that it has.
    """

    index: int
    name: str
    driver: str
    api: str
    kind: str
    subgroup: int
    memory_gib: float
    matrix: tuple[str, ...]

    @property
    def gpu(self) -> bool:
        """Would ggml take it without being told to? It takes discrete and integrated GPUs."""
        return self.kind in ("discrete GPU", "integrated GPU")

    def shown(self) -> str:
        """For people."""
        matrix = ", ".join(self.matrix) or "no cooperative matrices"
        driver = f"{self.driver}, Vulkan {self.api}"
        return f"{self.name} ({self.kind}, {driver}, subgroups of {self.subgroup}, {matrix})"


@cache
def devices() -> tuple[Device, ...]:
    """All devices of this machine; none without a loader or a driver."""
    try:
        library = ctypes.CDLL(_SONAME.get(sys.platform, _SONAME["linux"]))
    except OSError:
        return ()
    instance = _create_instance(library)
    if not instance:
        return ()
    try:
        handles = _handles(library, instance)
        return tuple(_describe(library, number, handle) for number, handle in enumerate(handles))
    finally:
        library.vkDestroyInstance(instance, None)


def visible() -> tuple[Device, ...]:
    """Those that ggml takes: the list of GGML_VK_VISIBLE_DEVICES, else all GPUs, each once."""
    asked = os.environ.get("GGML_VK_VISIBLE_DEVICES")
    if asked is None:
        return tuple({device.name: device for device in devices() if device.gpu}.values())
    numbers = [int(word) for word in asked.replace(",", " ").split() if word.isdigit()]
    return tuple(device for device in devices() if device.index in numbers)


def _create_instance(library: ctypes.CDLL) -> c_void_p | None:
    application = ctypes.create_string_buffer(
        struct.pack("@IxxxxPPIxxxxPII", _APPLICATION_INFO, 0, 0, 0, 0, 0, _API_1_1), 48
    )
    create = struct.pack(
        "@IxxxxPIxxxxPIxxxxPIxxxxP",
        *(_INSTANCE_CREATE_INFO, 0, 0, ctypes.addressof(application), 0, 0, 0, 0),
    )
    instance = c_void_p()
    failed = library.vkCreateInstance(ctypes.create_string_buffer(create, len(create)), None, byref(instance))
    return None if failed else instance


def _handles(library: ctypes.CDLL, instance: c_void_p) -> list[c_void_p]:
    library.vkEnumeratePhysicalDevices.argtypes = [c_void_p, POINTER(c_uint32), c_void_p]
    count = c_uint32()
    if library.vkEnumeratePhysicalDevices(instance, byref(count), None) or not count.value:
        return []
    handles = (c_void_p * count.value)()
    if library.vkEnumeratePhysicalDevices(instance, byref(count), handles):
        return []
    return [c_void_p(handle) for handle in handles[: count.value]]


def _describe(library: ctypes.CDLL, index: int, handle: c_void_p) -> Device:
    driver = ctypes.create_string_buffer(struct.pack("@IxxxxP", _DRIVER_PROPERTIES, 0), 536)
    subgroup = ctypes.create_string_buffer(
        struct.pack("@IxxxxP", _SUBGROUP_PROPERTIES, ctypes.addressof(driver)), 32
    )
    properties = ctypes.create_string_buffer(
        struct.pack("@IxxxxP", _PROPERTIES_2, ctypes.addressof(subgroup)), 16 + 824
    )
    library.vkGetPhysicalDeviceProperties2.argtypes = [c_void_p, c_void_p]
    library.vkGetPhysicalDeviceProperties2(handle, properties)
    api, _, _, _, kind = struct.unpack_from("@5I", properties, 16)
    return Device(
        index=index,
        name=_text(properties.raw, 16 + 20),
        driver=f"{_text(driver.raw, 20)} {_text(driver.raw, 276)}".strip(),
        api=f"{api >> 22 & 0x7F}.{api >> 12 & 0x3FF}.{api & 0xFFF}",
        kind=_KINDS[kind] if kind < len(_KINDS) else "other",
        subgroup=struct.unpack_from("@I", subgroup, 16)[0],
        memory_gib=_memory(library, handle),
        matrix=_matrix(library, handle),
    )


def _memory(library: ctypes.CDLL, handle: c_void_p) -> float:
    memory = ctypes.create_string_buffer(520)
    library.vkGetPhysicalDeviceMemoryProperties.argtypes = [c_void_p, c_void_p]
    library.vkGetPhysicalDeviceMemoryProperties(handle, memory)
    (heaps,) = struct.unpack_from("@I", memory, 260)
    local = [
        size
        for size, flags in (struct.unpack_from("@QI", memory, 264 + 16 * n) for n in range(heaps))
        if flags & 1
    ]
    return round(max(local, default=0) / 2**30, 1)


def _matrix(library: ctypes.CDLL, handle: c_void_p) -> tuple[str, ...]:
    library.vkEnumerateDeviceExtensionProperties.argtypes = [c_void_p, c_char_p, POINTER(c_uint32), c_void_p]
    count = c_uint32()
    library.vkEnumerateDeviceExtensionProperties(handle, None, byref(count), None)
    listed = ctypes.create_string_buffer(260 * max(1, count.value))
    library.vkEnumerateDeviceExtensionProperties(handle, None, byref(count), listed)
    names = {_text(listed.raw, 260 * number) for number in range(count.value)}
    return tuple(short for name, short in _MATRIX_EXTENSIONS.items() if name in names)


def _text(raw: bytes, offset: int) -> str:
    return raw[offset : offset + 256].split(b"\0", 1)[0].decode(errors="replace")
