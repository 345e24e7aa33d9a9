"""All settings of the gateway, read from environment variables."""

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, FilePath, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from flownet2.contract import MODEL_NAME

MIB = 2**20
_CORES = len(os.sched_getaffinity(0))


def _split(value: Any) -> Any:
    """Turn "a, b" into ["a", "b"]."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


Words = Annotated[list[str], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """The gateway's settings, each an environment variable: its name in capitals.

    Those that other programs do not read too have the prefix `GATEWAY_`.
    """

    model_config = SettingsConfigDict(
        env_prefix="GATEWAY_", env_ignore_empty=True, frozen=True, populate_by_name=True
    )

    host: str = Field(default="127.0.0.1", validation_alias="HOST", description="address to bind")
    port: int = Field(
        default=5003, ge=0, le=65535, validation_alias="PORT", description="port to listen on"
    )
    triton_endpoints: Words = Field(
        default=["127.0.0.1:8001"],
        min_length=1,
        validation_alias="TRITON_ENDPOINTS",
        description="Triton's gRPC endpoints, `host:port`, separated by commas; "
        "a DNS name stands for all of its addresses",
    )
    triton_metrics_port: int = Field(
        default=8002,
        gt=0,
        le=65535,
        validation_alias="TRITON_METRICS_PORT",
        description="port of Triton's metrics, which name the engine of each model for `/healthz`",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="OpenTelemetry collector (OTLP over HTTP) for traces; needs the `otel` extra; "
        "empty: no traces",
    )
    default_model: str = Field(
        default=MODEL_NAME, description="model of requests without `?model=`"
    )
    image_formats: Words = Field(
        default=["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM"],
        min_length=1,
        description="accepted image formats, by Pillow's names, separated by commas",
    )
    processes: int = Field(
        default=min(8, max(1, _CORES // 2)),
        gt=0,
        json_schema_extra={"shown_default": "half of the cores, at most 8"},
        description="processes; they share the limits of requests, bytes and threads",
    )
    max_body_bytes: int = Field(
        default=64 * MIB,
        gt=0,
        description="largest request body in bytes, as sent and decompressed",
    )
    max_image_pixels: int = Field(
        default=64_000_000,
        gt=0,
        description="largest number of pixels of an image, checked before decoding",
    )
    max_native_pixels: int = Field(
        default=4 * MIB,
        gt=0,
        description="largest number of pixels of an image with `?size=native`, "
        "each side rounded up to a multiple of 64; a model may have a smaller limit",
    )
    max_in_flight: int = Field(
        default=16,
        gt=0,
        description="requests processed at the same time; "
        "one with large images counts as several, one for each 16 MiB of memory",
    )
    max_waiting: int = Field(
        default=64, ge=0, description="requests that may wait besides these; more get a 503"
    )
    max_buffered_bytes: int = Field(
        default=128 * MIB,
        gt=0,
        description="bytes of request bodies in memory, all requests together; "
        "responses that clients have not read may need as much again",
    )
    threads: int = Field(
        default=min(8, _CORES),
        gt=0,
        json_schema_extra={"shown_default": "cores, at most 8"},
        description="threads for decoding and encoding",
    )
    default_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="deadline in seconds of requests without `X-Request-Timeout`",
    )
    max_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="longest deadline in seconds that a client can ask for",
    )
    retry_after_s: int = Field(default=1, gt=0, description="`Retry-After` of a 503 in seconds")
    keep_alive_s: int = Field(
        default=75,
        gt=0,
        description="seconds that an idle connection stays open between requests; "
        "longer than the idle timeout of a load balancer in front, which is often 60",
    )
    shutdown_delay_s: float = Field(
        default=1.0,
        ge=0,
        description="seconds from SIGTERM, when `/readyz` starts to fail, until no connection is "
        "accepted",
    )
    shutdown_grace_s: int = Field(
        default=25, gt=0, description="seconds that requests in flight then have to finish"
    )
    api_keys_file: FilePath | None = Field(
        default=None,
        description="file with one API key a line; empty: no key is required",
    )
    cors_origins: Words = Field(
        default=[],
        description="origins allowed by CORS, separated by commas (`*`: all)",
    )
    log_level: Annotated[str, BeforeValidator(lambda value: str(value).upper())] = Field(
        default="INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="DEBUG, INFO, WARNING or ERROR",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError(
                f"GATEWAY_MAX_BUFFERED_BYTES ({self.max_buffered_bytes}) must be at least "
                f"GATEWAY_MAX_BODY_BYTES ({self.max_body_bytes}), or no such body is accepted"
            )
        if self.max_timeout_s < self.default_timeout_s:
            raise ValueError(
                f"GATEWAY_MAX_TIMEOUT_S ({self.max_timeout_s}) must be at least "
                f"GATEWAY_DEFAULT_TIMEOUT_S ({self.default_timeout_s})"
            )
        return self

    def of_one_process(self) -> "Settings":
        """Return the settings with one process' share of the limits.

        Its share of bytes is at least the largest body.
        """

        def part(whole: int) -> int:
            return -(-whole // self.processes)

        return self.model_copy(
            update={
                "max_in_flight": part(self.max_in_flight),
                "max_waiting": part(self.max_waiting),
                "max_buffered_bytes": max(part(self.max_buffered_bytes), self.max_body_bytes),
                "threads": part(self.threads),
            }
        )


def table() -> str:
    """Return the settings as a Markdown table, which docs/operations.md holds."""
    rows = ["| Variable | Default | Meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        variable = field.validation_alias or f"GATEWAY_{name}".upper()
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = extra.get("shown_default", field.default)
        shown = ",".join(default) if isinstance(default, list) else default
        rows.append(
            f"| `{variable}` | {'' if shown in (None, '') else shown} | {field.description} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
