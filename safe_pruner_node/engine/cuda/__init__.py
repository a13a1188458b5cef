"""Kernels in CUDA C++ for SM 9.0, compiled when they are first needed.

A kernel is a source, ``.cu``, and the Python of the same name that says what it is compiled for and
launched with: `expert_flow` (all of the flow in one launch), `product` (rows times a weight matrix;
`product_plan` cuts it into tiles), `image_attention` (inside an image). ``sm90.cuh`` is what they
have in common. `available` says where they run, `source` reads one as a single text, `compile`
makes a cubin of it, `cubins` keeps it on disk.
"""
