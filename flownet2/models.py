"""Description of a served network, as Triton's model configuration and the gateway give it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Model:
    """A network that a server has loaded.

    Attributes:
        name: name of the model in Triton.
        version: version of the model in Triton.
        backend: Triton backend that runs it: "python", "onnxruntime" or "tensorrt".
        network: name of the architecture, such as "FlowNet2-cs".
        parameters: number of weights and biases.
        weights_source: where the weights come from.
        weights_license: licence of the weights.
        model_sha256: SHA-256 of the exported network with its weights.
        max_pixels: largest number of pixels of an image, both sides rounded up to multiples of 64.
        default: whether the server uses it for requests that name no model.
    """

    name: str
    version: str = ""
    backend: str | None = None
    network: str | None = None
    parameters: int | None = None
    weights_source: str | None = None
    weights_license: str | None = None
    model_sha256: str | None = None
    max_pixels: int | None = None
    default: bool = False

    @classmethod
    def from_parameters(
        cls,
        name: str,
        parameters: Mapping[str, Any],
        *,
        version: str = "",
        backend: str | None = None,
        default: bool = False,
    ) -> Self:
        """Read the `parameters` of Triton's model configuration.

        Args:
            name: name of the model.
            parameters: protobuf messages with a `string_value`, by key. Unknown keys are ignored,
                and so are numbers that are not decimal.
            version: version that Triton serves.
            backend: name of Triton's backend.
            default: whether the server uses the model for requests that name none.
        """
        texts = {key: value.string_value for key, value in parameters.items()}

        def number(key: str) -> int | None:
            text = texts.get(key, "")
            return int(text) if text.isdecimal() else None

        return cls(
            name,
            version,
            backend,
            network=texts.get("network"),
            parameters=number("parameters"),
            weights_source=texts.get("weights_source"),
            weights_license=texts.get("weights_license"),
            model_sha256=texts.get("model_sha256"),
            max_pixels=number("max_pixels"),
            default=default,
        )

    @classmethod
    def from_json(cls, description: Any) -> Self:
        """Read an entry of the gateway's `/models`; unknown keys are ignored.

        Raises:
            ValueError: it is not a description of a model.
        """
        if not isinstance(description, dict) or not isinstance(description.get("name"), str):
            raise ValueError(f"not a description of a model: {description!r:.100}")
        names = [field.name for field in fields(cls)]
        return cls(**{name: description[name] for name in names if name in description})
