"""π0.5 for inference: SigLIP tower, Gemma language model, Gemma action expert, flow matching.

Module names are those of openpi's PyTorch checkpoints, so a state dict loads without renaming.
Inputs hold only what exists: no empty cameras, no text padding. Positions are then 0..N-1 and
no mask is needed. `mask` and `positions` serve callers that do pad.

Shapes: B batch, N prefix tokens, T text tokens, H horizon, A action_dim, D width of the module,
h query heads, g key/value heads, d head_dim.

Sources: "π0.5: a Vision-Language-Action Model with Open-World Generalization" (2025);
`PI0Pytorch` in Physical-Intelligence/openpi (Apache-2.0).
"""

# mypy: disable-error-code="no-any-return"
# (calling an nn.Module is typed Any)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from safe_pruner_node.pi05.config import GemmaConfig, Pi05Config, VisionConfig

Rope: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin, [B, N, d] each."""
KeyValue: TypeAlias = tuple[Tensor, Tensor]
"""Keys (after RoPE) and values of one layer, [B, g, N, d] each."""


class RMSNorm(nn.Module):
    """Root-mean-square norm; with `cond_width` an adaptive one (adaRMS) with a residual gate."""

    def __init__(self, width: int, cond_width: int | None = None) -> None:
        super().__init__()
        if cond_width is None:
            self.weight = nn.Parameter(torch.zeros(width))
        else:
            self.dense = nn.Linear(cond_width, 3 * width)
        self.adaptive = cond_width is not None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalise x [B, N, D]; cond [B, D_cond] for adaRMS. Returns it and the gate [B, 1, D]."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)  # in fp32 whatever x is
        if not self.adaptive:
            return (y * (1.0 + self.weight.float())).to(x.dtype), None
        if cond is None:
            raise ValueError("an adaptive norm needs the time condition")
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, -1)  # [B, 1, D] each
        return (y * (1.0 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of x [B, h, N, d], halves convention (Gemma)."""
    cos, sin = (t[:, None] for t in rope)  # [B, 1, N, d]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class GemmaAttention(nn.Module):
    """The four projections; the arithmetic is in `GemmaLayer`."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        query_width = config.heads * config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, query_width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.width, bias=False)


class GemmaMLP(nn.Module):
    """GELU-gated MLP."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        gate = gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class GemmaLayer(nn.Module):
    """One decoder layer, in three steps so that a caller may drop tokens between them."""

    def __init__(self, config: GemmaConfig, cond_width: int | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = RMSNorm(config.width, cond_width)
        self.post_attention_layernorm = RMSNorm(config.width, cond_width)

    def qkv(
        self, x: Tensor, rope: Rope, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Project x [B, N, D] to q [B, h, N, d], k and v [B, g, N, d] (q, k rotated), and gate."""
        y, gate = self.input_layernorm(x, cond)
        return self.query(y, rope), *self.keys_values(y, rope), gate

    def query(self, y: Tensor, rope: Rope) -> Tensor:
        """Rotated queries [B, h, N, d] of normed rows y [B, N, D]."""
        q = self.self_attn.q_proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return rotate(q, rope)

    def keys_values(self, y: Tensor, rope: Rope) -> KeyValue:
        """Rotated keys and values, each [B, g, N, d], of normed rows y [B, N, D]."""
        k, v = (
            proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.self_attn.k_proj, self.self_attn.v_proj)
        )
        return rotate(k, rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of q [B, h, N_q, d] over k, v [B, g, N_k, d] to [B, N_q, h*d].

        `mask` broadcasts to [B, h, N_q, N_k]: boolean (True attends) or additive.
        """
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def finish(
        self, x: Tensor, attn_out: Tensor, gate: Tensor | None, cond: Tensor | None = None
    ) -> Tensor:
        """Output projection, residual, MLP, residual: x [B, N, D], attn_out [B, N, h*d]."""
        x = _residual(x, self.self_attn.o_proj(attn_out), gate)
        y, gate = self.post_attention_layernorm(x, cond)
        return _residual(x, self.mlp(y), gate)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        past_kv: KeyValue | None = None,
        cond: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Run the layer; `past_kv` is attended before x's own. Returns x and x's own (k, v)."""
        q, k, v, gate = self.qkv(x, rope, cond)
        own = (k, v)
        if past_kv is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_kv, own, strict=True))
        return self.finish(x, self.attend(q, k, v, mask), gate, cond), own


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate


class Gemma(nn.Module):
    """A stack of layers and a final norm; with `vocab_size` also the text embedding."""

    def __init__(
        self, config: GemmaConfig, vocab_size: int | None = None, cond_width: int | None = None
    ) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config, cond_width) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, cond_width)

    def blocks(self) -> list[GemmaLayer]:
        """The layers, with their type."""
        return cast("list[GemmaLayer]", list(self.layers))


class SiglipAttention(nn.Module):
    """Multi-head self-attention over the patches of one image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D/heads]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiglipMLP(nn.Module):
    """Two linear maps with a tanh-GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    """Patches to tokens, plus a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to tokens [B, N, D], row by row."""
        images = images.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding.weight


class SiglipVision(nn.Module):
    """The vision tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(SiglipLayer(config) for _ in range(config.depth))}
        )
        self.post_layernorm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [-1, 1] to tokens [B, N, D]."""
        x = self.embeddings(images).to(self.post_layernorm.weight.dtype)
        for layer in cast("nn.ModuleList", self.encoder["layers"]):
            x = layer(x)
        return self.post_layernorm(x)


class Pi05(nn.Module):
    """Images and a prompt in, a chunk of normalised actions out.

    One inference is `embed_images`, `embed_text`, `prefill`, then `denoise` once per flow step;
    `sample_actions` is exactly that and the reference for every faster path.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        vision, vlm, expert = config.vision, config.vlm, config.expert
        paligemma = nn.ModuleDict(
            {
                "vision_tower": nn.ModuleDict({"vision_model": SiglipVision(vision)}),
                "multi_modal_projector": nn.ModuleDict(
                    {"linear": nn.Linear(vision.width, vlm.width)}
                ),
                "language_model": Gemma(vlm, vocab_size=config.vocab_size),
            }
        )
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": paligemma}),
                "gemma_expert": nn.ModuleDict({"model": Gemma(expert, cond_width=expert.width)}),
            }
        )
        self.action_in_proj = nn.Linear(config.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.action_dim)
        self.time_mlp_in = nn.Linear(expert.width, expert.width)
        self.time_mlp_out = nn.Linear(expert.width, expert.width)

    @property
    def vlm(self) -> Gemma:
        """The language model that reads image and text tokens."""
        return cast(
            "Gemma", self.get_submodule("paligemma_with_expert.paligemma.model.language_model")
        )

    @property
    def expert(self) -> Gemma:
        """The action expert."""
        return cast("Gemma", self.get_submodule("paligemma_with_expert.gemma_expert.model"))

    @property
    def dtype(self) -> torch.dtype:
        """The type the transformer layers compute in."""
        return self.vlm.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.action_in_proj.weight.device

    def embed_images(self, images: Tensor) -> Tensor:
        """Image tokens: images [B, 3, S, S] in [-1, 1] to [B, tokens, D]; not scaled."""
        root = "paligemma_with_expert.paligemma.model"
        features = self.get_submodule(f"{root}.vision_tower.vision_model")(images)
        tokens = self.get_submodule(f"{root}.multi_modal_projector.linear")(features)
        return cast("Tensor", tokens.to(self.dtype))  # LeRobot keeps the vision path in fp32

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Text tokens [B, T] to [B, T, D], scaled by sqrt(D) as Gemma does."""
        return self.vlm.embed_tokens(tokens) * math.sqrt(self.config.vlm.width)

    def rope(self, positions: Tensor) -> Rope:
        """Rotary tables of positions [B, N], for the language model and the expert alike."""
        dim = self.config.vlm.head_dim
        exponent = torch.arange(0, dim, 2, device=positions.device).float() / dim
        angle = positions[..., None].float() / torch.pow(10_000.0, exponent)  # [B, N, d/2]
        angle = torch.cat([angle, angle], -1)  # [B, N, d]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def prefill(
        self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[KeyValue]:
        """Keys and values of every layer for the whole prefix x [B, N, D].

        `mask` broadcasts to [B, h, N, N], `positions` is [B, N]; both default to "all valid".
        The last layer's output is never read, so only its keys and values are computed.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        rope = self.rope(positions)
        *layers, last = self.vlm.blocks()
        cache: list[KeyValue] = []
        for layer in layers:
            x, kv = layer(x, rope, mask=mask)
            cache.append(kv)
        normed, _ = last.input_layernorm(x)
        return [*cache, last.keys_values(normed, rope)]

    def time_condition(self, t: Tensor) -> Tensor:
        """Flow time t [B], 1 (noise) to 0 (action), to the adaRMS condition [B, D_expert]."""
        width = self.config.expert.width
        # float64 as in openpi: the shortest period is 4e-3, fp32 phases would be off
        fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
        period = 4e-3 * (4.0 / 4e-3) ** fraction
        phase = (1.0 / period * 2 * math.pi) * t[:, None]  # [B, D/2]
        embedding = torch.cat([phase.sin(), phase.cos()], 1).to(self.time_mlp_in.weight.dtype)
        return silu(self.time_mlp_out(silu(self.time_mlp_in(embedding))))

    def embed_actions(self, x_t: Tensor) -> Tensor:
        """Noisy actions [B, H, A] to suffix tokens [B, H, D_expert]."""
        return self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype)).to(self.dtype)

    def velocity(self, hidden: Tensor, cond: Tensor) -> Tensor:
        """The expert's last hidden state [B, H, D_expert] to the flow velocity [B, H, A]."""
        y, _ = self.expert.norm(hidden, cond)
        return self.action_out_proj(y.to(self.action_out_proj.weight.dtype))

    def denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        kv: Sequence[KeyValue],
        prefix_len: int | Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity at flow time t [B] of noisy actions x_t [B, H, A].

        Args:
            x_t: Noisy actions.
            t: Flow time.
            kv: Prefix keys and values per layer; lengths may differ from layer to layer.
            prefix_len: Number of valid prefix tokens BEFORE any pruning (int, or [B] when
                padded): the suffix keeps the positions it was trained with.
            mask: Broadcasts to [B, h, H, N + H]; only for padded prefixes.

        Returns:
            Velocity [B, H, A].
        """
        cond = self.time_condition(t)  # [B, D]
        x = self.embed_actions(x_t)  # [B, H, D]
        offset = torch.as_tensor(prefix_len, device=x.device).reshape(-1, 1)  # [1 or B, 1]
        positions = offset + torch.arange(x.shape[1], device=x.device)
        rope = self.rope(positions.expand(x.shape[:2]))
        for layer, past in zip(self.expert.blocks(), kv, strict=True):
            x, _ = layer(x, rope, past, cond, mask)
        return self.velocity(x, cond)

    @torch.no_grad()
    def sample_actions(
        self,
        images: Sequence[Tensor],
        tokens: Tensor,
        noise: Tensor,
        flow_steps: int | None = None,
    ) -> Tensor:
        """One inference: images of [B, 3, S, S], tokens [B, T], noise [B, H, A] to [B, H, A]."""
        prefix = torch.cat([*(self.embed_images(i) for i in images), self.embed_text(tokens)], 1)
        kv = self.prefill(prefix)
        times, dt = flow_schedule(flow_steps or self.config.flow_steps)
        x_t = noise
        for t in times:
            batch_t = torch.full((len(noise),), t, device=noise.device)
            x_t = x_t + dt * self.denoise(x_t, batch_t, kv, prefix.shape[1])
        return x_t


def flow_schedule(steps: int) -> tuple[list[float], float]:
    """Times 1, 1 + dt, ... and the Euler step dt = -1/steps, in fp32 arithmetic as openpi's.

    The time embedding has a period of 4e-3, so a rounding of 1e-7 in t is visible in it.
    """
    dt = torch.tensor(-1.0 / steps)
    times, t = [], torch.tensor(1.0)
    for _ in range(steps):
        times.append(float(t))
        t = t + dt
    return times, float(dt)
