"""Losses against closed forms, the factored network against the plain one, and short runs."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d

from export.networks import NETWORKS, FlowNet2
from export.networks.operators import correlation
from export.weights import WeightsError, load_weights, save_weights
from training import train
from training.cost import cost_volume
from training.generator import Textures, load_textures
from training.loss import LEVEL_WEIGHTS, matching_loss, multiscale_loss
from training.model import TrainingC, carry_flow, channel_means, initialise, standardise
from training.pool import ScenePool
from training.ship import finished_model
from training.train import (
    ResumeError,
    Trainer,
    UnsupportedNetworkError,
    keep_memory,
    load_checkpoint,
    parse,
    parts_of,
    save_checkpoint,
)

MakeTrainer = Callable[..., Trainer]
SMALL = ["--crop", "64", "64", "--batch", "2", "--pool", "8", "--exact", "--device", "cpu"]


@pytest.fixture(scope="module")
def textures() -> Textures:
    keep_memory()
    return load_textures(None)


@pytest.fixture
def trainer(textures: Textures, monkeypatch: pytest.MonkeyPatch) -> MakeTrainer:
    """Makes runs that share one set of textures."""
    monkeypatch.setattr(train, "load_textures", lambda path, device: textures)

    def make(folder: Path, *options: str) -> Trainer:
        return Trainer(parse([*SMALL, "--validation", "1", "--out", str(folder), *options]))

    return make


def test_the_cost_volume_is_the_exported_correlation_and_so_are_its_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, 6, 8, generator=random, requires_grad=True)
    b = torch.randn(2, 5, 6, 8, generator=random, requires_grad=True)
    weight = torch.randn(2, 441, 6, 8, generator=random)
    fast, plain = cost_volume(a, b), correlation(a, b)
    torch.testing.assert_close(fast, plain)
    gradients = torch.autograd.grad((fast * weight).sum(), (a, b))
    expected = torch.autograd.grad((plain * weight).sum(), (a, b))
    torch.testing.assert_close(gradients, expected)


def test_the_multiscale_loss_of_zero_flow_is_the_weighted_length_of_the_flow() -> None:
    flow = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 64, 64)
    predictions = [torch.zeros(2, 2, 64 >> level, 64 >> level) for level in (6, 5, 4, 3, 2)]
    loss = multiscale_loss(predictions, flow, scale=20.0)
    assert loss == pytest.approx(sum(LEVEL_WEIGHTS) * 5 / 20, rel=1e-5)


def test_the_matching_loss_is_the_entropy_of_its_bilinear_target_at_the_best_logits() -> None:
    # 24 pixels right are one and a half steps, 16 pixels up are one: two cells, half each.
    flow = torch.tensor([24.0, -16.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    visible = torch.zeros(1, 64, 64, dtype=torch.bool)
    cost = torch.full((1, 441, 8, 8), -50.0)
    cost[:, 9 * 21 + 11] = cost[:, 9 * 21 + 12] = 0.0
    loss = matching_loss(cost, flow, visible, torch.tensor([-50.0]))
    assert loss == pytest.approx(0.6931, abs=1e-3)
    hidden = matching_loss(cost - 50, flow, ~visible, torch.tensor([0.0]))
    assert hidden == pytest.approx(0.0, abs=1e-3)


def test_the_folded_network_gives_what_the_factored_one_gave() -> None:
    torch.manual_seed(0)
    block = FlowNet2(NETWORKS["FlowNet2-c"]).blocks["net1"]
    factored = TrainingC(block)
    images = torch.rand(2, 1, 3, 64, 64) - 0.5
    with torch.no_grad():
        before = factored.decode(*factored.features(images))
        factored.fold()
        after = block(images[0], images[1])
    for factored_flow, plain_flow in zip(before, after, strict=True):
        torch.testing.assert_close(factored_flow, plain_flow, rtol=1e-4, atol=1e-5)


def test_what_leaves_the_crop_is_hidden(textures: Textures) -> None:
    pool = ScenePool(textures, capacity=8, crop=(64, 128), displacement=3.0, seed=5)
    batch = pool.draw(16, 1.0, torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    column, row = (x + batch.flow[:, 0]).round(), (y + batch.flow[:, 1]).round()
    outside = (column < 0) | (row < 0) | (column > 127) | (row > 63)
    assert 0 < outside.float().mean() < 1
    assert batch.occluded[outside].all()
    assert not batch.occluded.all()


def test_a_short_run_learns(tmp_path: Path, trainer: MakeTrainer) -> None:
    run = trainer(
        tmp_path,
        "--steps",
        "60",
        "--reuse",
        "1e9",
        "--learning-rate",
        "1e-3",
        "--log-seconds",
        "0",
    )
    run.run()
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "net1 flow"]
    errors = [float(row["epe"]) for row in rows]
    assert sum(errors[-15:]) < 0.8 * sum(errors[:15])
    assert (tmp_path / "validation.csv").exists()
    model, source = finished_model(tmp_path)
    assert "60 steps" in source
    image = torch.zeros(1, 70, 90, 3, dtype=torch.uint8)
    with torch.no_grad():
        assert model(image, image).shape == (1, 70, 90, 2)


def test_a_run_goes_on_to_the_step_where_it_stopped(tmp_path: Path, trainer: MakeTrainer) -> None:
    def steps(run: Trainer, count: int) -> None:
        for _ in range(count):
            run.begin_due_part()
            run.train_step(elapsed=0.0)

    options = ["--steps", "20", "--reuse", "2"]
    whole = trainer(tmp_path / "whole", *options)
    steps(whole, 12)
    first = trainer(tmp_path / "parts", *options)
    steps(first, 7)
    first.checkpoint()
    second = trainer(tmp_path / "parts", *options)
    assert second.step == 7
    assert second.part.name == "net1 flow"
    steps(second, 5)
    for name, value in whole.trainee.state_dict().items():
        assert torch.equal(value, second.trainee.state_dict()[name]), name
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


def test_a_cascade_trains_its_second_network_on_the_frozen_first(
    tmp_path: Path, trainer: MakeTrainer
) -> None:
    run = trainer(tmp_path, "--network", "FlowNet2-cs", "--steps", "10", "--reuse", "4")
    while run.part.block != "net2":
        run.begin_due_part()
        run.train_step(elapsed=0.0)
    frozen = {name: value.clone() for name, value in run.model.blocks["net1"].state_dict().items()}
    before = run.trainee.module.encoder["conv1"].weight.detach().clone()
    run.train_step(elapsed=0.0)
    assert not torch.equal(run.trainee.module.encoder["conv1"].weight, before)
    for name, value in run.model.blocks["net1"].state_dict().items():
        assert torch.equal(value, frozen[name]), name


def test_a_refining_network_begins_with_the_flow_that_it_is_given() -> None:
    block = FlowNet2(NETWORKS["FlowNet2-cs"]).blocks["net2"]
    initialise(block, seed=1)
    images = torch.rand(2, 9, 128, 192)
    flow = torch.randn(2, 2, 128, 192)
    inputs = torch.cat((images, flow, torch.rand(2, 1, 128, 192)), 1)
    standardise(block, lambda: block(inputs))
    carry_flow(block)
    with torch.no_grad():
        predictions = block(inputs)
    assert len(predictions) == 5
    for level, prediction in zip((6, 5, 4, 3, 2), predictions, strict=True):
        torch.testing.assert_close(prediction, avg_pool2d(flow, 2**level), atol=1e-5, rtol=0)


def test_a_network_is_stacked_on_a_weights_file(tmp_path: Path, trainer: MakeTrainer) -> None:
    first = FlowNet2(NETWORKS["FlowNet2-s"])
    channel_means(first)
    for name, block in first.blocks.items():
        initialise(block, seed=len(name))
    weights = tmp_path / "s.safetensors"
    save_weights(first, weights, "a test", "none")
    options = ("--network", "FlowNet2-ss", "--on", str(weights), "--steps", "2")
    run = trainer(tmp_path / "ss", *options)
    assert [part.name for part in run.parts] == ["net2 flow"]
    run.run()
    stored = load_weights(NETWORKS["FlowNet2-s"], weights)[0].state_dict()
    model, source = finished_model(tmp_path / "ss")
    assert source == "a test, then its last network 2 steps in 0 minutes"
    for name, value in stored.items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ResumeError, match="with --on"):
        trainer(tmp_path / "ss", "--network", "FlowNet2-ss", "--steps", "2")
    with pytest.raises(WeightsError, match="looks like FlowNet2-s"):
        trainer(tmp_path / "cs", "--network", "FlowNet2-cs", "--on", str(weights))
    with pytest.raises(UnsupportedNetworkError, match="without --on"):
        trainer(tmp_path / "s", "--network", "FlowNet2-s", "--on", str(weights))


def test_shares_add_up_and_fusion_is_refused() -> None:
    for network in NETWORKS.values():
        if network.fusion:
            with pytest.raises(UnsupportedNetworkError, match="FlowNet2-CSS"):
                parts_of(network)
        else:
            assert sum(part.share for part in parts_of(network)) == pytest.approx(1)


def test_a_checkpoint_comes_in_pieces_and_of_its_own_network_only(
    tmp_path: Path, trainer: MakeTrainer
) -> None:
    state = {"network": "FlowNet2-s", "tensor": torch.arange(10_000_000, dtype=torch.float32)}
    save_checkpoint(tmp_path / "checkpoint", state)
    sizes = [piece.stat().st_size for piece in (tmp_path / "checkpoint").iterdir()]
    assert len(sizes) == 3
    assert max(sizes) < 16_000_000
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint")["tensor"], state["tensor"])
    # As an interruption in the middle of the next write leaves it.
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint")["tensor"], state["tensor"])
    with pytest.raises(ResumeError, match="FlowNet2-s"):
        trainer(tmp_path, "--network", "FlowNet2-c", "--steps", "1")
