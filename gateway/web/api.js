// Client of the service's HTTP API.

import { parseNpy, parseNpz } from "./npy.js";

/** The service's URL. This module is at web/api.js below it, whatever prefix a proxy adds. */
export const BASE = new URL("..", import.meta.url);

const KEY = "flownet2-api-key";

/** A failed request; `field` is the field or parameter at fault, if there is one. */
export class Problem extends Error {
  constructor({ status = 0, field = null, detail, retryAfter = 0 }) {
    super(detail);
    Object.assign(this, { status, field, retryAfter });
  }
}

/** Keep an API key until this tab is closed; an empty key removes it. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Return true if requests carry a key. */
export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

async function call(path, options = {}) {
  const key = hasKey() ? { "X-API-Key": sessionStorage.getItem(KEY) } : {};
  const headers = { ...options.headers, ...key };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
    if (response.ok) return [response, await response.arrayBuffer()];
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The connection was lost. Is the service running? Try again." });
  }
  const problem = await response.json().catch(() => ({}));
  throw new Problem({
    status: response.status,
    field: problem.field,
    detail: problem.detail ?? `The server answered ${response.status} ${response.statusText}.`,
    retryAfter: Number(response.headers.get("Retry-After") ?? 0),
  });
}

/** Return the loaded networks as `GET /models` lists them. */
export async function models() {
  const [, body] = await call("models");
  return JSON.parse(new TextDecoder().decode(body)).models;
}

/** Return the path and the `Accept` header of a request. */
export function target({ size, model, both }) {
  const query = new URLSearchParams({ size });
  if (model) query.set("model", model);
  if (both) query.set("direction", "both");
  return {
    path: `estimate_flow/?${query}`,
    accept: both ? "application/x-npz" : "application/x-npy",
  };
}

/**
 * Estimate the flow of a request: `image1` and `image2` (`{blob, name}`), `size` ("512" or
 * "native"), `model`, and `both` for the occluded pixels too.
 *
 * Gives `flow` (`{width, height, data}`, u and v in turns), `occluded` (one byte a pixel, or null)
 * and `stages` (`[name, milliseconds]`, the last "total"; empty if nothing was measured).
 */
export async function estimate(request, signal) {
  const { path, accept } = target(request);
  const body = new FormData();
  body.append("image1", request.image1.blob, request.image1.name);
  body.append("image2", request.image2.blob, request.image2.name);
  const options = { method: "POST", body, headers: { Accept: accept }, signal };
  const [response, content] = await call(path, options);
  const arrays = request.both ? await parseNpz(content) : { flow: parseNpy(content) };
  return toResponse(arrays, response.headers.get("Server-Timing") ?? "");
}

/** Combine arrays and a `Server-Timing` header as `estimate` returns them. */
function toResponse({ flow, occluded }, timing) {
  const [height, width] = flow.shape;
  return {
    flow: { width, height, data: flow.data },
    occluded: occluded?.data ?? null,
    stages: [...timing.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]),
  };
}

/** Return the sample that the page opens with: two images and a response computed beforehand. */
export async function sample() {
  const file = async (name) => (await fetch(new URL(`web/sample/${name}`, BASE))).blob();
  const [first, second, arrays, about] = await Promise.all(
    ["image1.jpg", "image2.jpg", "flow.npz", "about.json"].map(file),
  );
  return {
    image1: { blob: first, name: "image1.jpg" },
    image2: { blob: second, name: "image2.jpg" },
    model: JSON.parse(await about.text()),
    response: toResponse(await parseNpz(await arrays.arrayBuffer()), ""),
  };
}
