"""HTTP service in front of Triton. The path of a request for flow through the modules:

1. `__main__` and `workers` bind the port and run one process or several.
2. `protocol` speaks HTTP/1.1 and closes connections that send nothing.
3. `middleware` adds request ID, log line, metrics and security headers; `keys` checks API keys.
4. `flow` reads the parameters; `negotiation` chooses the format of the response.
5. `body` reads and decompresses the body; `fields` extracts the two image files from it.
6. `guards` rejects hostile image files; `images` decodes and resizes the others.
7. `estimate` runs that work in `threads`, within the budgets of `admission`.
8. `cluster` chooses a Triton and `endpoint` runs the inference there.
9. `encoders` encodes the flow; `response` sends it no faster than the client reads.
10. `errors` lists every way in which this can fail.
"""
