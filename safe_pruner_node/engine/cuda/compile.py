"""From CUDA C++ to a kernel that can be launched, with NVIDIA's own bindings.

They come with torch's CUDA builds, like the compiler they call: no toolkit has to be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from safe_pruner_node.engine.cuda.cubins import cached, key_of


class CudaKernel:
    """One kernel on the current device, compiled unless this machine has done so before.

    Args:
        source: CUDA C++ that includes nothing.
        name: The kernel's name, ``extern "C"``.
        arch: What to compile for, such as ``sm_90a``.
        defines: Macros, integers.
        shared_bytes: Dynamic shared memory of a block.

    Raises:
        RuntimeError: It does not compile, or the driver refuses it.
    """

    def __init__(
        self, source: str, name: str, arch: str, defines: Mapping[str, int], shared_bytes: int
    ) -> None:
        options = _options(arch, defines)
        version = _check(nvrtc.nvrtcVersion())
        key = key_of(source, *options, *(str(number) for number in version))
        self._cubin = cached(key, lambda: compile_cubin(source, arch, defines))
        self._shared_bytes = shared_bytes
        module = _check(driver.cuModuleLoadData(self._cubin))
        self._function = _check(driver.cuModuleGetFunction(module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def blocks_at_once(self, threads: int) -> int:
        """How many blocks of so many threads are on the device at once, if nothing else is."""
        of_one = _check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                self._function, threads, self._shared_bytes
            )
        )
        device = torch.cuda.get_device_properties()
        return int(of_one) * device.multi_processor_count

    def launch(
        self,
        blocks: int,
        threads: int,
        argument: ctypes.Structure,
        *,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Run it on torch's current stream.

        Args:
            blocks: How many; a multiple of `cluster`.
            threads: Of a block.
            argument: Its only parameter, by value.
            cluster: Blocks that are on neighbouring multiprocessors at once.
            dependent: It may begin while the kernel before it is still ending, and waits for that
                one itself (see `kernels.launch`).
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attributes = [*_cluster(cluster), *_dependent(wanted=dependent)]
        config.attrs, config.numAttrs = attributes, len(attributes)
        _check(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))


def _cluster(size: int) -> list[driver.CUlaunchAttribute]:
    if size == 1:
        return []
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    dimension = attribute.value.clusterDim
    dimension.x, dimension.y, dimension.z = size, 1, 1
    return [attribute]


def _dependent(*, wanted: bool) -> list[driver.CUlaunchAttribute]:
    if not wanted:
        return []
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return [attribute]


def compile_cubin(source: str, arch: str, defines: Mapping[str, int]) -> bytes:
    """Compile; needs no GPU.

    Args:
        source: CUDA C++ that includes nothing.
        arch: What to compile for.
        defines: Macros, integers.

    Raises:
        RuntimeError: It does not compile; the message is the compiler's log.
    """
    options = [option.encode() for option in _options(arch, defines)]
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    cubin: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _options(arch: str, defines: Mapping[str, int]) -> list[str]:
    macros = (f"-D{name}={value}" for name, value in defines.items())
    return [f"--gpu-architecture={arch}", "--std=c++17", *macros]


def _check(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the call gives
    """What a call gives beside its status: nothing, one value, or a list of them."""
    status, *results = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status}")
    return results[0] if len(results) == 1 else results
