"""A kernel in CUDA C++, compiled when it is first needed.

`expert_flow.cu` is the kernel, `expert_flow.py` what it is launched with. `compile` makes a cubin
of any source, `cubins` keeps it on disk.
"""
