"""From CUDA C++ to a kernel that can be launched, with NVIDIA's own bindings.

They come with torch's CUDA builds, like the compiler they call: no toolkit has to be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from cuda.bindings import driver, nvrtc


class CudaKernel:
    """One compiled kernel on the current device.

    Args:
        source: CUDA C++ that includes nothing.
        name: The kernel's name, ``extern "C"``.
        defines: Macros, integers.
        shared_bytes: Dynamic shared memory of a block.

    Raises:
        RuntimeError: It does not compile, or the driver refuses it.
    """

    def __init__(
        self, source: str, name: str, defines: Mapping[str, int], shared_bytes: int
    ) -> None:
        binary = _compile(source, defines)
        self._shared_bytes = shared_bytes
        self._module = _check(driver.cuModuleLoadData(binary))
        self._function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def blocks_at_once(self, threads: int) -> int:
        """How many blocks of so many threads are on the device at once."""
        of_one = _check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                self._function, threads, self._shared_bytes
            )
        )
        device = torch.cuda.get_device_properties()
        return int(of_one) * device.multi_processor_count

    def launch(self, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        """Run it on torch's current stream; `argument` is its only parameter, by value."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        shared, parameters = self._shared_bytes, ctypes.addressof(pointers)
        _check(driver.cuLaunchKernel(self._function, *grid, *block, shared, stream, parameters, 0))


def _compile(source: str, defines: Mapping[str, int]) -> bytes:
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    options += [f"-D{name}={value}".encode() for name, value in defines.items()]
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _check(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the call gives
    """The result of a call, without its status."""
    status, *results = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status}")
    return results[0] if results else None
