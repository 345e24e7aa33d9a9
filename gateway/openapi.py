"""`python -m gateway.openapi`: print the OpenAPI document, which `openapi.json` holds."""

import json

from gateway.app import create_app
from gateway.settings import Settings

if __name__ == "__main__":
    print(json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False))
