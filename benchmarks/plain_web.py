"""`python -m benchmarks.plain_web TRITON PORT`: a plain web layer for comparison with the gateway.

Flask, one thread, ``json`` and ``tolist()``: it answers the gateway's usual request.
"""

import base64
import io
import json
import sys
import time

import numpy as np
from flask import Flask, Response, request
from PIL import Image
from tritonclient import grpc

SIZE = 512


def create_app(client: grpc.InferenceServerClient) -> Flask:
    """Return the service in front of a Triton."""
    app = Flask(__name__)

    @app.post("/estimate_flow/")
    def estimate_flow() -> Response:
        start = time.perf_counter()
        body = json.loads(request.data)
        inputs = []
        for name in ("image1", "image2"):
            image = Image.open(io.BytesIO(base64.b64decode(body[f"{name}_base64"])))
            width, height = image.size
            resized = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGB")
            tensor = grpc.InferInput(name, [1, SIZE, SIZE, 3], "UINT8")
            tensor.set_data_from_numpy(np.asarray(resized)[None])
            inputs.append(tensor)
        asked = time.perf_counter()
        flow = client.infer("flownet2", inputs).as_numpy("flow")[0]
        answered = time.perf_counter()
        factors = (width / SIZE, height / SIZE)
        text = json.dumps(
            {
                "flow": (flow * np.array(factors, np.float32)).tolist(),
                "scale_x_back_factor": factors[0],
                "scale_y_back_factor": factors[1],
            }
        )
        infer, total = answered - asked, time.perf_counter() - start
        timing = f"infer;dur={infer * 1e3:.1f}, total;dur={total * 1e3:.1f}"
        return Response(text, mimetype="application/json", headers={"Server-Timing": timing})

    return app


if __name__ == "__main__":
    with grpc.InferenceServerClient(sys.argv[1]) as triton:
        create_app(triton).run(port=int(sys.argv[2]), threaded=False)
