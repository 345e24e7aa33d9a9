"""The warp in gathers, which TensorRT builds, against PyTorch's grid_sample."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import parser

from export.engine.gathers import warp_by_gathers


@pytest.mark.parametrize("opset", [16, 18, 20])
@pytest.mark.parametrize(("padding", "remain"), [("border", 0), ("zeros", 2)])
def test_gathers_sample_as_grid_sample_does(padding: str, remain: int, opset: int) -> None:
    """Other kinds of `GridSample` than that of our warp are left as they are."""
    sample = f'GridSample<padding_mode = "{padding}", align_corners = 1>'
    model = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> graph '
        "(float[n, c, h, w] image, float[n, y, x, 2] grid) => (float[n, c, y, x] twice) {"
        f" once = {sample}(image, grid) twice = {sample}(once, grid) }}"
    )
    model = warp_by_gathers(model)
    assert [node.op_type for node in model.graph.node].count("GridSample") == remain
    assert not model.functions
    random = np.random.default_rng(0)
    image = random.normal(size=(2, 3, 7, 13)).astype(np.float32)
    grid = random.uniform(-1.4, 1.4, (2, 7, 13, 2)).astype(np.float32)
    grid[0, 0, :2] = ((-1, -1), (1, 1))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (sampled,) = session.run(None, {"image": image, "grid": grid})
    expected, where = torch.from_numpy(image), torch.from_numpy(grid)
    for _ in range(2):
        expected = F.grid_sample(expected, where, padding_mode=padding, align_corners=True)
    np.testing.assert_allclose(sampled, expected.numpy(), atol=1e-5)
