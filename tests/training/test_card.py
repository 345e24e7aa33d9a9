"""The shipped weights: they load and detect motion, and the pictures of their card exist."""

import re
from pathlib import Path

import numpy as np
import torch

from export.networks import NETWORKS
from export.weights import load_weights
from training.evaluate import score
from training.pairs import read_pairs

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights" / "flownet2.safetensors"
CARD = ROOT / "weights" / "README.md"


def test_the_shipped_weights_leave_a_fifth_of_the_error_of_zero_flow_on_the_samples() -> None:
    model, _ = load_weights(NETWORKS["FlowNet2-cs"], WEIGHTS)
    pairs = list(read_pairs(ROOT / "samples"))
    errors, zero = [], []
    for pair in pairs:
        images = [torch.from_numpy(np.array(frame))[None] for frame in pair.frames]
        with torch.inference_mode():
            flow = model(*images)[0].numpy()
        errors.append(score(flow, pair).epe)
        zero.append(score(np.zeros_like(flow), pair).epe)
    assert len(pairs) >= 3
    assert np.mean(errors) < 0.2 * np.mean(zero)


def test_the_weights_file_is_small_and_free() -> None:
    _, file = load_weights(NETWORKS["FlowNet2-cs"], WEIGHTS)
    assert WEIGHTS.stat().st_size < 25_000_000
    assert file.license == "GPL-3.0-or-later"
    assert "synthetic" in file.source


def test_pictures_of_the_card_exist() -> None:
    pictures = re.findall(r"\]\(([\w./-]+\.(?:png|jpg))\)", CARD.read_text())
    assert pictures
    for picture in pictures:
        assert (CARD.parent / picture).exists(), picture
