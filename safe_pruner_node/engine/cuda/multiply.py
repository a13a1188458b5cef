"""CUDA C++ of single tensor-core instructions, whose operands PTX wants listed one by one."""

from __future__ import annotations

PRELUDE = """\
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;
"""


def multiply(name: str, columns: int, *, transposed: bool = False) -> str:
    """A function for ``wgmma`` of 64 rows, 16 of K and so many columns, bf16 to fp32.

    Args:
        name: Of the function: ``name(c, a, b, accumulate)``. ``c`` are the `columns` / 2 sums of a
            thread, ``b`` is a descriptor of shared memory, and so is ``a``.
        columns: A multiple of 8 up to 256.
        transposed: ``b`` has K outside and columns inside; then ``a`` are registers.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    if transposed:
        parameter, left = "const u32 (&a)[4]", "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        after, immediates = count + 4, "1, 1, 1"
    else:
        parameter, left, inputs = "u64 a", f"%{count}", '"l"(a)'
        after, immediates = count + 1, "1, 1, 0, 0"
    return f"""\
__device__ __forceinline__ void {name}(float (&c)[{count}], {parameter}, u64 b, int accumulate) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{after + 1}, 0; "
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
               "{{{sums}}}, {left}, %{after}, p, {immediates};}}"
               : {outputs}
               : {inputs}, "l"(b), "r"(accumulate));
}}
"""
