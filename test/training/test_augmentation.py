import numpy as np
import torch

from safe_pruner_node.demonstrations.images import fit
from safe_pruner_node.pi05.transforms import to_model_images
from safe_pruner_node.training.augmentation import augmented, squares


def picture(height=72, width=128):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([3 * rows, columns, rows + columns], -1).astype(np.uint8)


def random():
    return torch.Generator().manual_seed(0)


def test_stored_frames_become_the_very_input_of_inference():
    image = picture()
    stored = torch.from_numpy(fit(image, 56).copy())[None]
    torch.testing.assert_close(
        squares(stored, 56), to_model_images(torch.from_numpy(image)[None], 56), atol=1e-6, rtol=0
    )


def test_none_changes_nothing():
    images = squares(torch.from_numpy(picture())[None], 128)
    assert augmented(images, "none", on_wrist=False, random=random()) is images


def test_colours_leave_every_edge_in_place():
    images = squares(torch.from_numpy(picture())[None].repeat(4, 1, 1, 1), 128)
    changed = augmented(images, "colour", on_wrist=False, random=random())
    assert (changed[0] - changed[1]).abs().mean() > 0.01  # each in its own way
    one = images[:, :, 30:100].flatten(1)
    other = changed[:, :, 30:100].flatten(1)
    for a, b in zip(one, other, strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.85
    assert changed.abs().max() <= 1.0


def test_openpi_moves_the_head_camera_and_never_a_wrist_camera():
    spot = torch.full((8, 3, 64, 64), -1.0)
    spot[:, :, 50:54, 50:54] = 1.0

    def centres(images):
        bright = (images.mean(1) > images.mean((1, 2, 3))[:, None, None] + 0.3).float()
        return (bright.sum(2) * torch.arange(64)).sum(1) / bright.sum((1, 2))

    head = centres(augmented(spot, "openpi", on_wrist=False, random=random()))
    wrist = centres(augmented(spot, "openpi", on_wrist=True, random=random()))
    assert head.std() > 0.5
    torch.testing.assert_close(wrist, torch.full((8,), 51.5))
