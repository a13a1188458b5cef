"""Triton kernels, one concept per file; nothing here knows of models or stages.

Vision tower and prefill, whose rows fill a GPU, so cuBLAS does most of their products:
`patches`, `norms`, `rotary`, `attention`, `prefill_attention`, `activation` (with one product of
its own); `quantise` ends those whose result an FP8 product reads.

Flow, 50 rows and bound by reading weights, so every product is here, with what surrounds it:
`modulated_pair`, `suffix_attention`, `gated_residual`, `flow_step`, `suffix_saliency`; `tiles` are
their block sizes, `launch` lets one begin while the one before it ends.
"""
