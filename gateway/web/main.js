// The page: wires its controls to the service and to the viewer.

import { Problem, estimate, hasKey, models, sample, setKey } from "./api.js";
import { toFlo, toNpy } from "./npy.js";
import { sentence, showModel, showStages } from "./report.js";
import { asCurl, asPython } from "./snippets.js";
import { Camera, Video } from "./video.js";
import { Viewer } from "./view.js";

const $ = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

let served = []; // what /models lists
let waiting = 0; // the timer that asks for it again
let pair = [null, null]; // the images of the next request: {blob, name}
let untouched = true; // they are still the sample's
let shown = null; // the request and the response that are on display
let running = null; // the AbortController of the request in flight
let video = null; // the opened Video
let live = null; // the Video or Camera that plays

const viewer = new Viewer({ flow: $("flow"), images: $("images"), legend: $("legend") }, (pixel) => {
  $("readout").classList.toggle("pointing", pixel !== null);
  $("readout").textContent = pixel ? sentence(pixel) : $("readout").dataset.empty;
});

// Requests

function request() {
  const model = served.find(({ name }) => name === $("model").value);
  return {
    image1: pair[0],
    image2: pair[1],
    size: chosen("size"),
    model: !model || model.default ? "" : model.name,
    both: $("occluded").checked,
  };
}

/** An image file without its EXIF orientation, which browsers follow and the service ignores. */
async function unturned({ blob }) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const exif = new TextDecoder("latin1").decode(bytes.subarray(0, 65536)).indexOf("Exif\0\0");
  if (exif >= 0) bytes[exif] = 0;
  return new Blob([bytes], { type: blob.type });
}

/** An image to draw, or null where the browser knows no such file. */
async function decode(image) {
  return createImageBitmap(await unturned(image)).catch(() => null);
}

/** Ask for the flow of the pair and show it; whether that went well. */
async function run() {
  if (!live) showSlots();
  if (!pair[0] || !pair[1]) return false;
  running?.abort();
  const { signal } = (running = new AbortController());
  const asked = request();
  clearProblems();
  document.body.classList.add("busy");
  if (!live) $("status").textContent = "Estimating…";
  const began = performance.now();
  try {
    const [response, image1, image2] = await Promise.all([
      estimate(asked, signal),
      decode(asked.image1),
      decode(asked.image2),
    ]);
    const ms = performance.now() - began;
    const model = served.find((one) => (asked.model ? one.name === asked.model : one.default));
    const rate = live ? `${(1000 / ms).toFixed(1)} pairs a second` : `${ms.toFixed(0)} ms in all`;
    display({ asked, response, image1, image2, model: model ?? {} }, rate);
    $("status").textContent = live ? rate : `Done in ${ms.toFixed(0)} ms.`;
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    $("status").textContent = "";
    if (live && error.retryAfter) {
      await pause(error.retryAfter);
      return true;
    }
    showProblem(error);
    return false;
  } finally {
    if (running?.signal === signal) document.body.classList.remove("busy");
  }
}

function display(result, rate) {
  shown = result;
  const { asked, response, image1, image2, model } = result;
  viewer.show({ ...response, image1, image2 });
  const { width, height } = viewer.size;
  $("credit").hidden = !untouched;
  $("dimensions").textContent = `${width} × ${height}`;
  $("longest").textContent = `longest ${viewer.longest.toFixed(1)} px`;
  showScale();
  showModel($("about"), model, response.flow, rate);
  $("timing").hidden = response.stages.length === 0;
  showStages({ bar: $("bar"), list: $("stages"), total: $("total") }, response.stages);
  showCode(asked);
}

function clearProblems() {
  for (const place of all(".problem")) place.textContent = "";
  for (const control of all("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

/** Show a sentence beside the field that it is about, or at the end of the form. */
function showProblem(error) {
  if (!(error instanceof Problem)) console.error(error);
  if (error.status === 0) loadModels();
  const keyless = error.status === 401;
  if (keyless) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  const place = $(`problem-${keyless ? "key" : error.field}`) ?? $("problem");
  place.textContent = error.message;
  document.querySelector(`[aria-describedby="${place.id}"]`)?.setAttribute("aria-invalid", "true");
}

/** Fill the list of networks, as soon as there are any. */
async function loadModels() {
  try {
    served = await models();
    $("service").textContent = served.length ? "Ready" : "The model is being loaded…";
  } catch (error) {
    served = [];
    $("service").textContent = error.status === 401 ? "Asks for a key" : "Not reachable";
    if (error.status === 401) {
      showProblem(error);
      return;
    }
  } finally {
    document.body.classList.toggle("ready", served.length > 0);
  }
  clearTimeout(waiting);
  if (!served.length) {
    waiting = setTimeout(loadModels, 3000);
    return;
  }
  $("model").replaceChildren(
    ...served.map(({ name, network, default: first }) =>
      new Option(network ? `${network} (${name})` : name, name, first, first),
    ),
  );
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key-form").hidden = true;
  clearProblems();
  loadModels();
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!pair[0] || !pair[1]) showProblem(new Problem({ detail: "Choose two images first." }));
  run();
});

for (const control of all(".options input, .options select")) {
  control.addEventListener("change", () => live || run());
}

// Images

/** Take an image file for one side of the pair. */
function setImage(side, file) {
  if (untouched) pair = [null, null];
  untouched = false;
  pair[side] = { blob: file, name: file.name };
}

async function showSlots() {
  for (const [side, slot] of [$("slot1"), $("slot2")].entries()) {
    const [picture, name] = [slot.querySelector("img"), slot.querySelector(".name")];
    URL.revokeObjectURL(picture.src);
    picture.hidden = !pair[side];
    picture.onerror = () => (picture.hidden = true);
    name.textContent = pair[side]?.name ?? `Choose image ${side + 1}`;
    if (pair[side]) picture.src = URL.createObjectURL(await unturned(pair[side]));
  }
}

for (const [side, input] of [$("image1"), $("image2")].entries()) {
  input.addEventListener("change", () => {
    if (!input.files.length) return;
    setImage(side, input.files[0]);
    input.value = "";
    run();
  });
  input.parentElement.addEventListener("drop", (event) => take(event, side));
}

$("swap").addEventListener("click", () => {
  pair.reverse();
  run();
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => take(event));

/** Take dropped files: a video, two images in the order of their names, or one for a side. */
function take(event, side) {
  event.preventDefault();
  event.stopPropagation();
  document.body.classList.remove("dragging");
  const files = [...event.dataTransfer.files];
  const film = files.find(({ type }) => type.startsWith("video/"));
  if (film) {
    setSource("video");
    openVideo(film);
  } else if (files.length) {
    setSource("files");
    files.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    if (files.length > 1 || (side === undefined && pair.every(Boolean))) pair = [null, null];
    const first = files.length > 1 ? 0 : (side ?? pair.indexOf(null));
    files.slice(0, 2).forEach((file, i) => setImage(first + i, file));
    run();
  }
}

// Video and camera

function setSource(name) {
  document.querySelector(`input[name="source"][value="${name}"]`).checked = true;
  for (const panel of all("[data-source]")) panel.hidden = panel.dataset.source !== name;
  stop();
}

for (const input of all('input[name="source"]')) {
  input.addEventListener("change", () => setSource(input.value));
}

async function openVideo(file) {
  stop();
  clearProblems();
  video?.close();
  video = null;
  try {
    video = await Video.open(file, $("video"));
  } catch (error) {
    return showProblem(new Problem({ field: "video", detail: error.message }));
  }
  $("video-name").textContent = file.name;
  $("steps").hidden = false;
  await showFrame(0);
}

$("video-file").addEventListener("change", ({ target }) => {
  if (target.files.length) openVideo(target.files[0]);
});

/** Ask for the flow from one frame to the one `step` later. */
async function showFrame(index) {
  const step = Math.max(1, Math.min(Math.round(Number($("step").value)), video.length - 1));
  const last = Math.max(0, video.length - 1 - step);
  const first = Math.min(Math.max(index, 0), last);
  $("frame").max = last;
  $("frame").value = first;
  $("frame-name").textContent = `${first} → ${first + step} of ${video.length}`;
  const frames = await Promise.all([video.frame(first), video.frame(first + step)]);
  if (frame() !== first) return true; // another one is wanted by now
  pair = frames;
  untouched = false;
  return run();
}

const frame = () => Number($("frame").value);
$("previous").addEventListener("click", () => showFrame(frame() - 1));
$("next").addEventListener("click", () => showFrame(frame() + 1));
$("frame").addEventListener("change", () => showFrame(frame()));
$("step").addEventListener("change", () => showFrame(frame()));

/** Ask for pair after pair, as fast as the service answers, until it is stopped. */
async function play(source, button, advance) {
  live = source;
  $("status").setAttribute("aria-live", "off"); // nobody wants every pair read out
  button.setAttribute("aria-pressed", "true");
  while (live === source && (await advance()));
  if (live === source) stop();
}

function stop() {
  if (live instanceof Camera) live.close();
  live = null;
  showSlots();
  $("status").removeAttribute("aria-live");
  $("camera").hidden = true;
  $("live").textContent = "Start the camera";
  $("play").textContent = "Play";
  for (const button of [$("play"), $("live")]) button.setAttribute("aria-pressed", "false");
}

$("play").addEventListener("click", () => {
  if (live) return stop();
  $("play").textContent = "Pause";
  return play(video, $("play"), async () => {
    if (frame() >= Number($("frame").max)) return false;
    return showFrame(frame() + 1);
  });
});

$("live").addEventListener("click", async () => {
  if (live) return stop();
  clearProblems();
  let camera;
  try {
    camera = await Camera.open($("camera"));
  } catch (error) {
    return showProblem(new Problem({ field: "camera", detail: error.message }));
  }
  $("camera").hidden = false;
  $("live").textContent = "Stop the camera";
  return play(camera, $("live"), async () => {
    pair = await camera.pair();
    untouched = false;
    return run();
  });
});

// The view

function showScale() {
  $("maximum-label").hidden = chosen("scale") === "auto";
  viewer.set({ maximum: chosen("scale") === "auto" ? null : Number($("maximum").value) });
  $("rim").textContent = `${viewer.maximum.toFixed(1)} px`;
}

for (const input of all('input[name="scale"]')) {
  input.addEventListener("change", () => {
    if (input.value === "fixed") $("maximum").value = Math.ceil(viewer.longest);
    showScale();
  });
}
$("maximum").addEventListener("input", () => Number($("maximum").value) > 0 && showScale());

function showOptions() {
  viewer.set({
    arrows: $("arrows").checked,
    occluded: $("occluded").checked,
    blend: Number($("blend").value),
    warped: chosen("second") === "warped",
  });
}

for (const control of all('#arrows, #occluded, #blend, input[name="second"]')) {
  control.addEventListener("input", showOptions);
}
$("occluded").addEventListener("change", ({ target }) => {
  if (target.checked && !shown?.response.occluded && !live) run();
});
showOptions(); // a browser that reloads a page keeps what was set

// The response

const FILES = {
  flo: () => toFlo(shown.response.flow),
  npy: () => toNpy(shown.response.flow),
  png: () => viewer.picture(),
};

for (const button of all("[data-format]")) {
  button.addEventListener("click", async () => {
    const { format } = button.dataset;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await FILES[format]());
    link.download = `flow.${format}`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

function showCode(asked) {
  const write = chosen("language") === "curl" ? asCurl : asPython;
  $("code").textContent = write(asked, hasKey());
}

for (const input of all('input[name="language"]')) {
  input.addEventListener("change", () => shown && showCode(shown.asked));
}
$("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren($("code"));
  document.execCommand("copy"); // navigator.clipboard is for https:// and localhost alone
  $("copy").textContent = "Copied";
  await pause(1.5);
  $("copy").textContent = "Copy";
});

// What a visitor sees first

async function open() {
  const { image1, image2, model, response } = await sample();
  if (!untouched) return;
  pair = [image1, image2];
  showSlots();
  const asked = { ...request(), size: "native", both: true, model: "" };
  const [first, second] = await Promise.all(pair.map(decode));
  display({ asked, response, image1: first, image2: second, model }, "computed beforehand");
  $("status").textContent = "A sample, computed beforehand.";
}

loadModels();
open();
