"""One policy step: an observation in, an action chunk and a report out.

Begin at `base` (the interface), then `policy` (from images and words, to actions in the policy's
units), `session` (one query on tensors: the stages in order, the pruner between them), `stages`.

====================  ============================================================================
built from            `settings`, `build`; around a live model of openpi or LeRobot: `wrap`
around a query        `nvjpeg` and `staging` (images to the device), `prompt` (padding to buckets),
                      `timing`, `report`, `warm_up`
what a stage does     `stages`, and behind it `prefix` (the language model), `flow` (the action
                      expert), `attention`: plain PyTorch, the meaning of everything below
how a stage is run    `runner` (as it is written), `graphs` (captured once, replayed from then on),
                      `compiled` (captured after torch.compile), `fused` (captured with our kernels)
stages in kernels     `fused_vision`, `fused_prefix`, `fused_denoise`: they call `products` and
                      `kernels/` in order. The flow is `resident_flow`, one kernel in `cuda/`, or
                      where that cannot run `fused_flow` (in `flow_buffers`). `fused_pruner`: what
                      a pruner has the runner run
products in them      `products` (cuBLAS and Triton), `tensor_core_products` (a kernel in `cuda/`,
                      where it can run)
weights for them      `packed_weights` (the one way to lay matrices side by side), `projection`
                      (one matrix in bf16 or FP8); for the flow `expert_weights`,
                      `resident_images` (copies for `resident_flow`)
FP8                   `e4m3` (numbers, products), `fp8` (which layers, put into the model, for every
                      path), `fp8_calibration` (the file that a checkpoint needs for it)
====================  ============================================================================
"""
