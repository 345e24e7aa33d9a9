"""Losses against closed forms, the factored network against the plain one, and short runs."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from export.networks import NETWORKS, FlowNet2
from export.networks.blocks import CORRELATION
from export.networks.operators import correlation
from export.weights import WeightsError, load_weights, save_weights
from flownet2.formats import write_flow
from training import train
from training.cost import cost_volume
from training.generator import Mixture
from training.loss import LEVEL_WEIGHTS, matching_loss, multiscale_loss
from training.model import (
    TrainingC,
    carry_flow,
    channel_means,
    initialise,
    initialise_from_data,
)
from training.pool import ScenePool, collate
from training.ship import finished_model, mean_with
from training.textures import Textures
from training.train import Trainer, parse
from training.trainee import Trainee

ROOT = Path(__file__).parents[2]
MakeTrainer = Callable[..., Trainer]
SMALL = ["--crop", "64", "64", "--batch", "2", "--pool", "8", "--float32", "--device", "cpu"]


@pytest.fixture
def trainer(textures: Textures, monkeypatch: pytest.MonkeyPatch) -> MakeTrainer:
    """Makes runs that share one set of textures."""
    monkeypatch.setattr(train, "Textures", lambda folder: textures)

    def make(folder: Path, *options: str) -> Trainer:
        return Trainer(parse([*SMALL, "--out", str(folder), *options]))

    return make


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of an untrained FlowNet2-c."""
    network = FlowNet2(NETWORKS["FlowNet2-c"])
    channel_means(network)
    initialise(network.blocks["net1"], seed=3)
    path = tmp_path_factory.mktemp("weights") / "c.safetensors"
    save_weights(network, path, "a test", "none")
    return path


def test_the_cost_volume_is_the_exported_correlation_and_so_are_its_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, 6, 8, generator=random, requires_grad=True)
    b = torch.randn(2, 5, 6, 8, generator=random, requires_grad=True)
    weight = torch.randn(2, 441, 6, 8, generator=random)
    fast, plain = cost_volume(a, b), correlation(a, b, **CORRELATION)
    torch.testing.assert_close(fast, plain)
    gradients = torch.autograd.grad((fast * weight).sum(), (a, b))
    expected = torch.autograd.grad((plain * weight).sum(), (a, b))
    torch.testing.assert_close(gradients, expected)


def test_the_multiscale_loss_of_zero_flow_is_the_weighted_length_of_the_flow() -> None:
    flow = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 64, 64)
    predictions = [torch.zeros(2, 2, 64 >> level, 64 >> level) for level in (6, 5, 4, 3, 2)]
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    loss = multiscale_loss(predictions, flow, valid, scale=20.0)
    assert loss == pytest.approx(sum(LEVEL_WEIGHTS["paper"]) * 5 / 20, rel=1e-5)
    loss = multiscale_loss(predictions, flow, valid, 20.0, LEVEL_WEIGHTS["finest"], exponent=0.4)
    assert loss == pytest.approx(2.48 * (5 / 20 + 0.01) ** 0.4, rel=1e-5)
    loss = multiscale_loss(
        predictions, flow, valid, 20.0, LEVEL_WEIGHTS["finest"], 0.4, robust_levels=1
    )
    assert loss == pytest.approx(1.2 * 5 / 20 + 1.28 * (5 / 20 + 0.01) ** 0.4, rel=1e-5)


def test_the_matching_loss_is_the_entropy_of_its_bilinear_target_at_the_best_logits() -> None:
    # 24 pixels right are one and a half steps, 16 pixels up are one: two cells, half each.
    flow = torch.tensor([24.0, -16.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    visible = torch.zeros(1, 64, 64, dtype=torch.bool)
    cost = torch.full((1, 441, 8, 8), -50.0)
    cost[:, 9 * 21 + 11] = cost[:, 9 * 21 + 12] = 0.0
    loss = matching_loss(cost, flow, visible, torch.tensor([-50.0]), ~visible)
    assert loss == pytest.approx(0.6931, abs=1e-3)
    hidden = matching_loss(cost - 50, flow, ~visible, torch.tensor([0.0]), ~visible)
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
        again = TrainingC(block)
        again.unfold()
        unfolded = again.decode(*again.features(images))
    for factored_flow, plain_flow, third in zip(before, after, unfolded, strict=True):
        torch.testing.assert_close(factored_flow, plain_flow, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third, plain_flow, rtol=1e-4, atol=1e-5)


def test_what_leaves_the_crop_is_hidden(textures: Textures) -> None:
    pool = ScenePool(textures, 8, (64, 128), displacement=3.0, mixture=Mixture(), seed=5)
    random = torch.Generator().manual_seed(0)
    batch = collate(pool.draw(16, 1.0, random), random)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    column, row = (x + batch.flow[:, 0]).round(), (y + batch.flow[:, 1]).round()
    outside = (column < 0) | (row < 0) | (column > 127) | (row > 63)
    assert 0 < outside.float().mean() < 1
    assert batch.occluded[outside].all()
    assert not batch.occluded.all()


def test_a_share_of_the_scenes_moves_a_tenth(textures: Textures) -> None:
    pools = [ScenePool(textures, 32, (64, 64), 1.0, Mixture(small), seed=5) for small in (0.0, 0.5)]
    lengths = [pool.flow.norm(dim=1).mean(dim=(1, 2)).view(4, 8).mean(dim=1) for pool in pools]
    assert torch.equal(lengths[0] == lengths[1], torch.tensor([False, True, False, True]))
    assert (lengths[1][::2] < 0.3 * lengths[0][::2]).all()


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
        rows = [row for row in csv.DictReader(file) if row["stage"] == "flow"]
    errors = [float(row["epe"]) for row in rows]
    assert sum(errors[-15:]) < 0.8 * sum(errors[:15])
    model, source = finished_model(tmp_path)
    assert "60 steps" in source
    image = torch.zeros(1, 70, 90, 3, dtype=torch.uint8)
    with torch.no_grad():
        assert model(image, image).shape == (1, 70, 90, 2)


def test_a_run_goes_on_to_the_step_where_it_stopped(tmp_path: Path, trainer: MakeTrainer) -> None:
    def steps(run: Trainer, count: int) -> None:
        for _ in range(count):
            if run.schedule.stage_ends:
                run.start_flow_stage()
            run.train_step(elapsed=0.0)

    options = ["--steps", "20", "--reuse", "2"]
    whole = trainer(tmp_path / "whole", *options)
    steps(whole, 12)
    first = trainer(tmp_path / "parts", *options)
    steps(first, 7)
    first.save()
    second = trainer(tmp_path / "parts", *options)
    assert second.schedule.step == 7
    assert not second.schedule.stage.matching
    steps(second, 5)
    for name, value in whole.trainee.state_dict().items():
        assert torch.equal(value, second.trainee.state_dict()[name]), name
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, second.average.state_dict()[name]), name


def test_datasets_are_mixed_into_the_scenes(
    tmp_path: Path, trainer: MakeTrainer, stored: Path
) -> None:
    options = ["--from", str(stored), "--steps", "4", "--data", "pairs", f"{ROOT / 'samples'}:0.5"]
    run = trainer(tmp_path / "half", *options)
    run.run()
    assert run.loaded == run.drawn // 2 > 0
    with (tmp_path / "half" / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["pairs"]) > 0
    whole = trainer(tmp_path / "whole", *options[:-1], str(ROOT / "samples"))
    first = whole.batch()
    again = trainer(tmp_path / "again", *options[:-1], str(ROOT / "samples")).batch()
    assert torch.equal(first.images, again.images)
    assert whole.pool.rendered == 0


def test_a_network_is_stacked_on_a_weights_file_which_stays(
    tmp_path: Path, trainer: MakeTrainer, stored: Path
) -> None:
    options = ("--network", "FlowNet2-cs", "--from", str(stored), "--steps", "2")
    run = trainer(tmp_path / "cs", *options)
    before = run.model.blocks["net2"].encoder["conv1"].weight.detach().clone()
    run.run()
    assert not torch.equal(run.model.blocks["net2"].encoder["conv1"].weight, before)
    model, source = finished_model(tmp_path / "cs")
    assert source == "a test, lastly net2, 2 steps in 0 minutes"
    for name, value in run.model.blocks["net1"].state_dict().items():
        assert torch.equal(model.blocks["net1"].state_dict()[name], value), name
        assert torch.equal(value.half().float(), value), name
    with pytest.raises(ValueError, match="--train"):
        trainer(tmp_path / "cs", *options, "--train", "net1", "net2")
    with pytest.raises(WeightsError, match="holds no blocks"):
        trainer(tmp_path / "CS", "--network", "FlowNet2-CS", "--from", str(stored))
    with pytest.raises(ValueError, match="net1"):
        trainer(tmp_path / "none", "--network", "FlowNet2-cs")
    for options in (("--network", "FlowNet2"), ("--train", "net2")):
        with pytest.raises(ValueError, match="cannot be trained"):
            trainer(tmp_path / "none", *options)


def test_a_cascade_is_tuned_end_to_end_from_later_files_first(
    tmp_path: Path, trainer: MakeTrainer, stored: Path
) -> None:
    trainer(tmp_path / "cs", "--network", "FlowNet2-cs", "--from", str(stored)).save()
    both = tmp_path / "cs.safetensors"
    save_weights(finished_model(tmp_path / "cs")[0], both, "an older test", "none")
    options = ["--from", str(both), "--from", str(stored), "--train", "net1", "net2"]
    run = trainer(tmp_path / "tuned", "--network", "FlowNet2-cs", *options, "--steps", "1")
    assert run.source.startswith("a test")
    weights = [block.state_dict() for block in run.model.blocks.values()]
    before = [block["decoder.predict2.weight"].clone() for block in weights]
    run.run()
    for block, old in zip(weights, before, strict=True):
        assert not torch.equal(block["decoder.predict2.weight"], old)
    layer = "decoder.predict2.weight"
    tuned, mean = (finished_model(tmp_path / "tuned")[0] for _ in range(2))
    mean_with(mean, both, share=0.75)
    for name, old in load_weights(mean.network, both)[0].blocks.items():
        expected = 0.75 * tuned.blocks[name].state_dict()[layer] + 0.25 * old.state_dict()[layer]
        torch.testing.assert_close(mean.blocks[name].state_dict()[layer], expected)


def test_an_exact_match_leaves_gradients_finite() -> None:
    model = FlowNet2(NETWORKS["FlowNet2-ss"])
    trainee = Trainee(model, ["net1", "net2"])
    for block in model.blocks.values():
        initialise(block, seed=1)
        torch.nn.init.zeros_(block.decoder.predict2.weight)
    image = torch.rand(1, 3, 64, 64)
    predictions, _ = trainee(torch.stack([image, image]))
    sum(levels[-1].sum() for levels in predictions).backward()
    assert all(p.grad.isfinite().all() for p in trainee.parameters() if p.grad is not None)
    assert model.blocks["net1"].decoder.predict2.bias.grad is not None


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, trainer: MakeTrainer, stored: Path
) -> None:
    run = trainer(tmp_path, "--from", str(stored), "--steps", "1")
    with torch.no_grad():
        run.model.blocks["net1"].decoder.predict2.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        run.run()


def test_validation_is_the_mean_error_of_each_family(
    tmp_path: Path, trainer: MakeTrainer, stored: Path
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8))
    for name, length in (("a_0", 1e3), ("a_1", 3e3), ("b_0", 5e3)):
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        for frame in ("frame0.png", "frame1.png"):
            image.save(folder / frame)
        write_flow(folder / "gt.flo", np.full((64, 128, 2), (0, length), np.float32))
    options = ["--validation", str(tmp_path / "pairs"), "--from", str(stored), "--steps", "1"]
    run = trainer(tmp_path / "run", *options)
    for name, average in run.average.named_parameters():
        if "predict" in name:
            average.data.zero_()
    errors = run.validation.errors(run.predict)
    assert (errors["a"], errors["b"]) == pytest.approx((2e3, 5e3))
    assert errors["100+"] == errors["outside"] == pytest.approx(3e3)
    assert np.isnan(errors["inside"])
    run.run()
    with (tmp_path / "run" / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert float(rows[0]["b"]) == pytest.approx(5e3)


def test_a_refining_network_begins_with_the_flow_that_it_is_given() -> None:
    block = FlowNet2(NETWORKS["FlowNet2-cs"]).blocks["net2"]
    initialise(block, seed=1)
    images = torch.rand(2, 9, 128, 192)
    flow = torch.randn(2, 2, 128, 192)
    inputs = torch.cat((images, flow, torch.rand(2, 1, 128, 192)), 1)
    initialise_from_data([block], lambda: block(inputs))
    carry_flow(block)
    with torch.no_grad():
        predictions = block(inputs)
    assert len(predictions) == 5
    for level, prediction in zip((6, 5, 4, 3, 2), predictions, strict=True):
        torch.testing.assert_close(prediction, avg_pool2d(flow, 2**level), atol=1e-5, rtol=0)
