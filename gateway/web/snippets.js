// A request as code: with curl, with the Python client, and with plain Python.

import { BASE, target } from "./api.js";

const shell = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
const python = (text) => JSON.stringify(text);

/** Return the request as a shell command. */
export function asCurl(request, withKey) {
  const { path, accept } = target(request);
  const file = (name) => `"${name.replace(/[\\"]/g, String.raw`\$&`)}"`; // curl's own quotes
  const parts = [
    `curl --fail-with-body ${shell(new URL(path, BASE).href)}`,
    ...(withKey ? [`-H "X-API-Key: $FLOWNET2_API_KEY"`] : []),
    `-H ${shell(`Accept: ${accept}`)}`,
    `-F ${shell(`image1=@${file(request.image1.name)}`)}`,
    `-F ${shell(`image2=@${file(request.image2.name)}`)}`,
    `-o flow.${request.both ? "npz" : "npy"}`,
  ];
  return parts.join(" \\\n  ");
}

/** Return the request in Python: with the client, which uses the images' own size, or without. */
export function asPython(request, withKey) {
  const [first, second] = [request.image1, request.image2].map(({ name }) => python(name));
  if (request.size !== "native") return withoutClient(request, first, second, withKey);
  const server = python(BASE.href.replace(/\/$/, ""));
  return [
    "from flownet2 import Client",
    "",
    `client = Client(${server}${request.model ? `, model=${python(request.model)}` : ""})`,
    `result = client.flow(${first}, ${second}${request.both ? `, direction="both"` : ""})`,
    "result.flow  # float32 [height, width, 2], in pixels",
    ...(request.both ? ["result.occluded  # bool [height, width]"] : []),
  ].join("\n");
}

function withoutClient(request, first, second, withKey) {
  const { path, accept } = target(request);
  const key = withKey ? `, "X-API-Key": os.environ["FLOWNET2_API_KEY"]` : "";
  return [
    `import io${withKey ? "\nimport os" : ""}`,
    "",
    "import httpx2",
    "import numpy as np",
    "",
    `with open(${first}, "rb") as image1, open(${second}, "rb") as image2:`,
    `    response = httpx2.post(`,
    `        ${python(new URL(path, BASE).href)},`,
    `        files={"image1": image1, "image2": image2},`,
    `        headers={"Accept": ${python(accept)}${key}},`,
    `        timeout=60,`,
    `    ).raise_for_status()`,
    "result = np.load(io.BytesIO(response.content))",
  ].join("\n");
}
