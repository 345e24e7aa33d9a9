// A request as a person would repeat it: with curl, and with the Python client.

import { BASE, wire } from "./api.js";

const shell = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
const python = (text) => JSON.stringify(text);

/** The request as a shell command. */
export function asCurl(request, withKey) {
  const { path, accept } = wire(request);
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

/** The request in Python. */
export function asPython({ image1, image2, size, model, both }) {
  const names = [image1, image2].map((image) => python(image.name));
  const options = [
    ...(size === "native" ? [] : [`size=${python(size)}`]),
    ...(model ? [`model=${python(model)}`] : []),
    ...(both ? [`direction="both"`] : []),
  ];
  return [
    "from flownet2 import Client",
    "",
    `client = Client(${python(BASE.href.replace(/\/$/, ""))})`,
    `result = client.flow(${[...names, ...options].join(", ")})`,
    "result.flow  # float32 [height, width, 2], in pixels",
    ...(both ? ["result.occluded  # bool [height, width]"] : []),
  ].join("\n");
}
