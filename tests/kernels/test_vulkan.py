"""The Vulkan build on llvmpipe: operations against the CPU, and planted faults that they have to see."""

from __future__ import annotations

import pytest

from tests.conftest import absent
from tests.kernels import vulkan_faults, vulkan_ops
from turbo_eval.errors import TurboEvalError
from turbo_eval.llama.build import find_build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        find_build("vulkan")
    except TurboEvalError as problem:
        absent(problem)


@pytest.mark.parametrize("op", vulkan_ops.SHORT)
def test_operations_agree_with_the_cpu(op: str) -> None:
    passed, total, output = vulkan_ops.run(op, vulkan_ops.SHORT[op])
    assert 0 < passed == total, output[-4000:]


@pytest.mark.parametrize("fault", vulkan_faults.FAULTS, ids=lambda fault: fault.name.split(":")[0])
def test_a_planted_fault_is_caught(fault: vulkan_faults.Fault) -> None:
    passed, total, output = vulkan_ops.run(fault.op, fault.params)
    assert 0 < passed == total, output[-4000:]
    failed, _ = vulkan_faults.caught(fault)
    assert failed > 0
