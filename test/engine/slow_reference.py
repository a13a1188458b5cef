"""SAFE-Pruner written a second time, slowly: masks instead of gathers, loops instead of tensors.

The forward pass keeps openpi's padded layout (empty cameras, text padding), computes every row of
every layer and hides pruned tokens by masking their keys. The pruner follows algorithms 1 and 2 of
the paper line by line in float64. Nothing of `pruning/` or of `engine/` is used.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class PaddedQuery:
    """One query with all its camera slots and its text padding."""

    slots: torch.Tensor  # [C_slots, 3, S, S]
    present: tuple[bool, ...]  # per slot
    tokens: torch.Tensor  # [1, T_max]
    n_text: int
    noise: torch.Tensor  # [1, H, A]


class PaddedForward:
    """One padded forward pass, layer by layer, with attention spelled out."""

    def __init__(self, model, query, layer, steps):
        self.model, self.query, self.layer, self.steps = model, query, layer, steps
        self.per_camera = model.config.vision.tokens
        slot_tokens = model.embed_images(query.slots)  # [C, n, D]
        text = model.embed_text(query.tokens)
        valid = [p for p in query.present for _ in range(self.per_camera)]
        n_visual_slots = len(valid)
        valid += [i < query.n_text for i in range(query.tokens.shape[1])]
        self.valid = torch.tensor(valid)
        self.visual = torch.tensor([i for i in range(n_visual_slots) if valid[i]])
        self.text = torch.arange(n_visual_slots, n_visual_slots + query.n_text)
        self.x = torch.cat([slot_tokens.flatten(0, 1)[None], text], 1)
        self.z = slot_tokens.flatten(0, 1)[self.visual]
        self.positions = (self.valid.long().cumsum(0) - 1).clamp(min=0)[None]
        self.prefix_len = int(self.valid.sum())

    def attend(self, q, k, v, key_mask):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(~key_mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def early(self, query_rows):
        """Saliency at layer ls-1 over the valid visual tokens."""
        cache, text_q = [], None
        x, rope = self.x, self.model.rope(self.positions)
        for i in range(self.layer):
            block = self.model.vlm.layers[i]
            q, k, v, gate = block.qkv(x, rope)
            cache.append((k, v))
            text_q = q[:, :, self.text]
            x = block.finish(x, self.attend(q, k, v, self.valid), gate)
        if query_rows == "text":
            return slow_saliency(text_q[0], cache[-1][0][0, :, self.visual])
        seen = {}
        time = torch.ones(1)
        self.expert_pass(self.query.noise, time, cache, {}, seen, self.prefix_len)
        return seen[self.layer - 1]

    def late(self, keep, deep_layers, offset=None):
        """Actions and deep saliency, with only the visual tokens `keep` seen from layer ls on."""
        kept = self.valid.clone()
        if keep is not None:
            kept[self.visual] = False
            kept[self.visual[torch.as_tensor(keep)]] = True
        cache, masks = [], {}
        x, rope = self.x, self.model.rope(self.positions)
        for i, block in enumerate(self.model.vlm.layers):
            masks[i] = self.valid if i < self.layer else kept
            q, k, v, gate = block.qkv(x, rope)
            cache.append((k, v))
            x = block.finish(x, self.attend(q, k, v, masks[i]), gate)
        x_t, maps = self.query.noise, []
        time, dt = torch.ones(1), torch.tensor(-1.0 / self.steps)  # fp32, as openpi adds them up
        for _ in range(self.steps):
            seen = {}
            start = self.prefix_len if offset is None else offset
            v_t = self.expert_pass(x_t, time, cache, masks, seen, start)
            x_t = x_t + dt * v_t
            time = time + dt
            maps.append([seen[layer] for layer in deep_layers])
        return x_t, np.mean(maps, axis=0)

    def expert_pass(self, x_t, time, cache, masks, seen, start):
        cond = self.model.time_condition(time)
        x = self.model.embed_actions(x_t)
        horizon = x.shape[1]
        rope = self.model.rope(start + torch.arange(horizon)[None])
        for i, (past_k, past_v) in enumerate(cache):
            block = self.model.expert.layers[i]
            q, k, v, gate = block.qkv(x, rope, cond)
            mask = torch.cat([masks.get(i, self.valid), torch.ones(horizon, dtype=torch.bool)])
            seen[i] = slow_saliency(q[0], past_k[0, :, self.visual])
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
            x = block.finish(x, self.attend(q, k, v, mask), gate, cond)
        return self.model.velocity(x, cond)


def slow_saliency(q, k):
    """Eq. 1 and 2 with loops: q [h, R, d], visual keys k [g, N, d]."""
    q, k = q.double().numpy(), k.double().numpy()
    heads, rows, dim = q.shape
    total = np.zeros(k.shape[1])
    for h in range(heads):
        keys = k[h * len(k) // heads]
        for r in range(rows):
            logits = np.array([q[h, r] @ key / math.sqrt(dim) for key in keys])
            weights = np.exp(logits - logits.max())
            total += weights / weights.sum()
    return total / (heads * rows)


class SlowSafe:
    """Algorithms 1 and 2, with the camera floor and matching within a camera as options."""

    def __init__(self, *, rho, lambda_, gamma, within_camera, floor, per_camera):
        self.rho, self.lambda_, self.gamma = rho, lambda_, gamma
        self.within_camera, self.floor, self.per_camera = within_camera, floor, per_camera
        self.reference = None

    def decide(self, z, early):
        """(keyframe, kappa, keep)."""
        z = z.double().numpy()
        if self.reference is None:
            return True, math.nan, None
        pi = self.predict(z)
        predicted = [self.reference["early"][u] for u in pi]
        dot = sum(a * b for a, b in zip(early, predicted, strict=True))
        norms = math.sqrt(sum(a * a for a in early)) * math.sqrt(sum(b * b for b in predicted))
        kappa = dot / norms
        if kappa < self.gamma:
            return True, kappa, None
        scores = []
        for v, u in enumerate(pi):
            deep = sum(layer[u] for layer in self.reference["deep"]) / len(self.reference["deep"])
            scores.append((1 - self.lambda_) * early[v] + self.lambda_ * deep)
        return False, kappa, self.top_k(scores)

    def refresh(self, z, early, deep):
        self.reference = {"z": z.double().numpy(), "early": early, "deep": deep}

    def predict(self, z):
        pi = []
        for v in range(len(z)):
            best, best_u = -math.inf, -1
            for u, other in enumerate(self.reference["z"]):
                if self.within_camera and u // self.per_camera != v // self.per_camera:
                    continue
                c = z[v] @ other / (np.linalg.norm(z[v]) * np.linalg.norm(other))
                if c > best:
                    best, best_u = c, u
            pi.append(best_u)
        return pi

    def top_k(self, scores):
        k = max(1, round((1 - self.rho) * len(scores)))
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        kept = []
        for camera in range(len(scores) // self.per_camera):
            own = [i for i in ranked if i // self.per_camera == camera]
            kept += own[: self.floor]
        for i in ranked:
            if len(kept) < k and i not in kept:
                kept.append(i)
        return sorted(kept)
