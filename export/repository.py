"""A model folder of a Triton repository: the served contract and its configurations.

The contract (names, types, shapes) stands here once. One configuration for each way of running a
network is written from it, to be chosen with Triton's ``--model-config-name``:

- ``cpu`` (also ``config.pbtxt``, what Triton takes unless told otherwise): the Python backend;
- ``onnx``: ONNX Runtime on a GPU with our correlation op;
- ``tensorrt``: a TensorRT plan built by ``python -m export tensorrt`` on the GPU that serves.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

IMAGE_INPUTS = ("image1", "image2")  # UINT8 [height, width, 3], RGB
FLOW_OUTPUT = "flow"  # FP32 [height, width, 2]
MAX_BATCH_SIZE = 8
USUAL_SIZE = (512, 512)  # height and width of what the gateway asks for by default

QUEUE_DELAY_US = 1_000
MAX_QUEUE_SIZE = 64
# Upper bound too: a request may only ask for less. The gateway's own bound is the same.
QUEUE_TIMEOUT_US = 120_000_000

ONNX_OP_LIBRARY = "libflownet2_onnxruntime.so"  # found by the loader in the image of Triton

CONFIGURATIONS = ("cpu", "onnx", "tensorrt")
DEFAULT_CONFIGURATION = "cpu"


def write_model(
    repository: Path, name: str, model: onnx.ModelProto, description: Mapping[str, str]
) -> Path:
    """Write ``<repository>/<name>`` with its configurations and version 1.

    Files are replaced whole, so that a server that starts meanwhile reads old or new ones.

    Args:
        description: goes into the configuration's parameters, where the gateway's model list
            finds it: ``network``, ``parameters``, ``weights_source``, ``weights_license``.

    Returns:
        The model's folder.
    """
    folder = repository / name
    for sub in ("1", "configs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    with replacing(folder / "1" / "model.onnx") as new:
        onnx.save(model, new)
    for module in (Path(__file__).parent / "cpu").glob("[!_]*.py"):
        with replacing(folder / "1" / module.name) as new:
            shutil.copyfile(module, new)
    write_configurations(folder, description)
    return folder


def write_configurations(folder: Path, description: Mapping[str, str]) -> None:
    """Write ``config.pbtxt`` and ``configs/`` of a model folder (see :func:`write_model`)."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for configuration in CONFIGURATIONS:
        text = as_text(model_config(folder.name, configuration, description))
        targets = [folder / "configs" / f"{configuration}.pbtxt"]
        if configuration == DEFAULT_CONFIGURATION:
            targets.append(folder / "config.pbtxt")
        for target in targets:
            with replacing(target) as new:
                new.write_text(text, encoding="utf-8")


def model_config(name: str, configuration: str, description: Mapping[str, str]) -> pb.ModelConfig:
    """One of :data:`CONFIGURATIONS`, as Triton's own message."""
    config = _contract(name, description)
    if configuration == "cpu":
        config.backend = "python"
        config.default_model_filename = "model.py"
        config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
        # One request and a full batch: the first request of a size pays for planning it.
        _warm_up(config, (1, MAX_BATCH_SIZE))
        return config

    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)
    _warm_up(config, range(1, MAX_BATCH_SIZE + 1))
    if configuration == "onnx":
        config.backend = "onnxruntime"
        config.platform = "onnxruntime_onnx"
        config.default_model_filename = "model.onnx"
        config.model_operations.op_library_filename.append(ONNX_OP_LIBRARY)
        # 1 is HEURISTIC: the default times every algorithm anew for each shape, seconds for each
        # batch size. A parameter, not an execution accelerator's option: where a configuration has
        # parameters, as ours have, the backend takes the search from there alone.
        config.parameters["cudnn_conv_algo_search"].string_value = "1"
    elif configuration == "tensorrt":
        config.backend = "tensorrt"
        config.platform = "tensorrt_plan"
        config.default_model_filename = "model.plan"
        # Profile 0: the usual size; 1: batches of other sizes; 2: single pairs of any size. Each
        # takes the memory that it needs; by default, each takes what the hungriest needs.
        config.instance_group[0].profile.extend(["0", "1", "2"])
        allocation = config.parameters["execution_context_allocation_strategy"]
        allocation.string_value = "ON_PROFILE_CHANGE"
        config.optimization.cuda.graphs = True
        for batch_size in range(1, MAX_BATCH_SIZE + 1):
            graph = config.optimization.cuda.graph_spec.add(batch_size=batch_size)
            for image in IMAGE_INPUTS:
                graph.input[image].dim.extend([*USUAL_SIZE, 3])
    else:
        raise ValueError(f"no configuration {configuration!r}, only {', '.join(CONFIGURATIONS)}")
    return config


def as_text(config: pb.ModelConfig) -> str:
    """The text of a ``config.pbtxt``."""
    return f"# Written by `python -m export`.\n{text_format.MessageToString(config)}"


def _contract(name: str, description: Mapping[str, str]) -> pb.ModelConfig:
    """What every configuration has in common: what clients see, batching and queue."""
    config = pb.ModelConfig(name=name, max_batch_size=MAX_BATCH_SIZE)
    for image in IMAGE_INPUTS:
        config.input.add(name=image, data_type=pb.TYPE_UINT8, dims=[-1, -1, 3])
    config.output.add(name=FLOW_OUTPUT, data_type=pb.TYPE_FP32, dims=[-1, -1, 2])
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = QUEUE_DELAY_US
    queue = batching.default_queue_policy
    queue.max_queue_size = MAX_QUEUE_SIZE
    queue.default_timeout_microseconds = QUEUE_TIMEOUT_US
    queue.allow_timeout_override = True
    queue.timeout_action = pb.ModelQueuePolicy.REJECT
    for key, value in description.items():
        config.parameters[key].string_value = value
    return config


def _warm_up(config: pb.ModelConfig, batch_sizes: Iterable[int]) -> None:
    for batch_size in batch_sizes:
        warmup = config.model_warmup.add(name=f"batch {batch_size}", batch_size=batch_size)
        for image in IMAGE_INPUTS:
            warmup.inputs[image].data_type = pb.TYPE_UINT8
            warmup.inputs[image].dims.extend([*USUAL_SIZE, 3])
            warmup.inputs[image].random_data = True


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which then takes the target's place at once."""
    new = target.with_name(f".{target.name}.new")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
