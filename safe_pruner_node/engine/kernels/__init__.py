"""Triton kernels, one concept per file; nothing here knows of models or stages.

Vision tower and prefill, whose rows fill a GPU, so most of their products are those of
`products.py`: `patches`, `gather`, `norms`, `rotary`, `attention`, `prefill_attention`,
`activation` (with one product of its own); `quantise` ends those whose result an FP8 product reads.

Pruner: `token_match` against the keyframe, `early_votes` and `token_scores` from attention rows to
scores, `token_rank` from scores to what goes on.

Flow, 50 rows and bound by reading weights, so every product is here, with what surrounds it:
`modulated_pair`, `suffix_attention`, `gated_residual`, `flow_step`, `suffix_saliency`; `tiles` are
their block sizes.

`launch` lets a kernel begin while the one before it ends, `dependent` says where that works.
"""
