"""`flownet2 models`."""

from flownet2 import service
from flownet2.client import Client
from flownet2.command.options import Server
from flownet2.command.terminal import print_table, say


def models(server: Server = None) -> None:
    """List the networks that a server has loaded, and where their weights are from."""
    with service.server(server, say) as url, Client(url) as client:
        found = client.models()
    print_table(
        ("name", "network", "parameters", "weights", "licence"),
        [
            (
                model.name,
                model.network or "",
                f"{model.parameters:,}" if model.parameters else "",
                model.weights_source or "",
                model.weights_license or "",
            )
            for model in found
        ],
    )
