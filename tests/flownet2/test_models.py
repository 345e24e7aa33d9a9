"""Descriptions of models, as Triton and the gateway give them."""

import pytest

from flownet2 import Model


class Parameter:
    """Triton's protobuf message of a parameter."""

    def __init__(self, value: str) -> None:
        self.string_value = value


def test_parameters_of_a_triton_configuration() -> None:
    texts = {"network": "FlowNet2-cs", "parameters": "123", "max_pixels": "4194304", "other": "x"}
    parameters = {key: Parameter(text) for key, text in texts.items()}
    model = Model.from_parameters("flownet2", parameters, version="1", backend="python")
    assert model == Model(
        "flownet2", "1", "python", "FlowNet2-cs", parameters=123, max_pixels=4194304
    )
    assert Model.from_parameters("a", {"max_pixels": Parameter("many")}) == Model("a")


def test_entry_of_the_gateway() -> None:
    entry = {"name": "flownet2", "parameters": 123, "default": True, "of a later version": 1}
    assert Model.from_json(entry) == Model("flownet2", parameters=123, default=True)
    for other in (None, [], {"version": "1"}, {"name": 1}):
        with pytest.raises(ValueError, match="not a description"):
            Model.from_json(other)
