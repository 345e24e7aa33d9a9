"""Inputs and outputs of every served model, and the image sizes that the networks support.

Triton model: `image1`, `image2` UINT8 `[N, height, width, 3]` RGB in, `flow` FP32
`[N, height, width, 2]` out, in pixels of the images, u to the right and v down.
"""

IMAGE_INPUTS = ("image1", "image2")
IMAGE_TYPE = "UINT8"
FLOW_OUTPUT = "flow"
FLOW_TYPE = "FP32"

MODEL_NAME = "flownet2"
MAX_BATCH_SIZE = 8
MINIMUM_SIDE = 16
SIZE_MULTIPLE = 64
"""Images are resized to multiples of this inside the network: its encoders halve six times."""
BATCH_EDGE = 576
"""Largest height and width in a batch on a GPU (plugins/CMakeLists.txt reads this line)."""
GRID = (512, 512)
"""Height and width of the flow that the HTTP API returns unless `size=native` is asked for."""


def adapted(side: int) -> int:
    """Return the side at which the network computes an image side: the next multiple of 64."""
    return (side + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE
