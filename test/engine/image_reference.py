"""Where the resident flow's kernels look for numbers, one by one; and prefixes to look at."""

import torch

from safe_pruner_node.pi05.config import PI05


def in_chunk(row, column):
    """Where number `column` of a row of 64 is, by the swizzle of 128 bytes."""
    address = row * 128 + column * 2  # bytes
    return (address ^ (address >> 7 & 7) << 4) // 2


def images_of(cache, horizon):
    """Keys and values of every layer in blocks of 64 keys, chunks of 64 channels; zero behind."""
    images = []
    for tensor in (tensor for pair in cache for tensor in pair):
        _, _, n, d = tensor.shape
        key = torch.arange(n, device=tensor.device)[:, None]
        channel = torch.arange(d, device=tensor.device)
        at = (key // 64 * (d // 64) + channel // 64) * 64 * 64 + in_chunk(key % 64, channel % 64)
        images.append(tensor.new_zeros(-(-(n + horizon) // 64) * 64 * d))
        images[-1][at.flatten()] = tensor.flatten()
    return torch.cat(images)


def prefixes(device):
    """Keys and values of layers with some, few, and whole blocks of keys."""
    random, d = torch.Generator(device).manual_seed(0), PI05.expert.head_dim
    lengths = [200] * 3 + [70] * 10 + [192] * 5
    like = {"generator": random, "device": device, "dtype": torch.bfloat16}
    return [tuple(torch.randn(1, 1, n, d, **like) for _ in range(2)) for n in lengths]
