"""The model that Triton's Python backend runs; Python imports it as `export.served`, a link."""
