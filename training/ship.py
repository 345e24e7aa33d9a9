"""Convert a training run into a weights file: the averaged weights, as float16 safetensors.

    python -m training.ship runs/c weights/flownet2.safetensors

`--mean-with` ships the mean of the run's weights and earlier weights, which often generalises
better than either (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022). `--share`
is the weight of the run in the mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from export.networks import NETWORKS, FlowNet2
from export.weights import load_weights, save_weights
from training.trainee import Trainee

LICENSE = "GPL-3.0-or-later"


def finished_model(folder: Path) -> tuple[FlowNet2, str]:
    """Return the network of a run's last checkpoint, and a sentence about its origin."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = FlowNet2(NETWORKS[state["network"]])
    average = AveragedModel(Trainee(model, state["blocks"]))
    average.load_state_dict(state["average"])
    trainee = average.module
    assert isinstance(trainee, Trainee)
    if trainee.matcher is not None:
        trainee.matcher.fold()
    duration = f"{state['step']} steps in {state['elapsed'] / 60:.0f} minutes"
    return trainee.model, state["source"] + duration


def mean_with(model: FlowNet2, file: Path, share: float) -> None:
    """Average the weights of a network with those in a file, in place.

    Args:
        model: the network whose weights are replaced by the mean.
        file: weights of the same network.
        share: weight of `model` in the mean, 0 to 1.

    Raises:
        WeightsError: the file is unreadable, or belongs to another network.
    """
    other, _ = load_weights(model.network, file)
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(before, 1 - share)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.ship", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of training.train")
    parser.add_argument("weights", type=Path, help="file to write")
    parser.add_argument("--mean-with", type=Path, help="file with earlier weights: ship the mean")
    parser.add_argument("--share", type=float, help="weight of the run in the mean (default: 0.5)")
    arguments = parser.parse_args()
    if arguments.share is not None and not arguments.mean_with:
        parser.error("--share needs --mean-with")
    share = 0.5 if arguments.share is None else arguments.share
    if not 0 <= share <= 1:
        parser.error(f"--share {share:g} is not from 0 to 1")
    model, source = finished_model(arguments.run)
    if arguments.mean_with:
        mean_with(model, arguments.mean_with, share)
        source += f", averaged with earlier weights (share of the run: {share:g})"
    save_weights(model, arguments.weights, source, LICENSE)
    print(f"{arguments.weights}: {source}, {arguments.weights.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
