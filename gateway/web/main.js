// The page: connects its controls to the service and to the viewer.

import { Problem, estimate, hasKey, models, sample, setKey } from "./api.js";
import { $, all, chosen, pause } from "./dom.js";
import { toFlo, toNpy } from "./npy.js";
import { connect, isPlaying, openVideo, showPanel } from "./playback.js";
import { readout, showModel, showStages } from "./report.js";
import { asCurl, asPython } from "./snippets.js";
import { compare, errorMap, isTruth, readTruth } from "./truth.js";
import { Viewer } from "./view.js";

let served = []; // models that the service lists
let retry = 0; // timer of the next attempt to list them
let pair = [null, null]; // the images of the next request: {blob, name}
let truth = null; // its ground truth, if there is one
let isSample = true; // the pair is still the sample
let shown = null; // the request and the response on display
let running = null; // the AbortController of the request in flight

const viewer = new Viewer({ flow: $("flow"), images: $("images"), legend: $("legend") }, (pixel) => {
  $("readout").classList.toggle("pointing", pixel !== null);
  $("readout").textContent = pixel ? readout(pixel) : $("readout").dataset.empty;
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

/** Return an image file without its EXIF orientation, which browsers apply and the service ignores. */
async function unturned({ blob }) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const exif = new TextDecoder("latin1").decode(bytes.subarray(0, 65536)).indexOf("Exif\0\0");
  if (exif >= 0) bytes[exif] = 0;
  return new Blob([bytes], { type: blob.type });
}

/** Return an image to draw, or null if the browser does not support its format. */
async function decode(image) {
  return createImageBitmap(await unturned(image)).catch(() => null);
}

/** Estimate the flow of the pair and show it; give true if that succeeded. */
async function run() {
  const live = isPlaying();
  if (!live) showSlots();
  if (!pair[0] || !pair[1]) return false;
  running?.abort();
  const { signal } = (running = new AbortController());
  const asked = request();
  clearProblems();
  document.body.classList.add("busy");
  if (!live) $("status").textContent = "Estimating…";
  const start = performance.now();
  try {
    const [response, image1, image2] = await Promise.all([
      estimate(asked, signal),
      decode(asked.image1),
      decode(asked.image2),
    ]);
    const ms = performance.now() - start;
    const model = served.find((each) => (asked.model ? each.name === asked.model : each.default));
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
  $("credit").hidden = !isSample;
  $("dimensions").textContent = `${width} × ${height}`;
  $("longest").textContent = `longest ${viewer.longest.toFixed(1)} px`;
  showErrors();
  showScale();
  showModel($("about"), model, response.flow, rate);
  $("timing").hidden = response.stages.length === 0;
  showStages({ bar: $("bar"), list: $("stages"), total: $("total") }, response.stages);
  showCode(asked);
}

/** Compare the flow with the ground truth, if there is one. */
function showErrors() {
  $("result-kind").hidden = truth === null;
  $("accuracy").textContent = "";
  if (!truth) return;
  const { width, height } = viewer.size;
  if (truth.width !== width || truth.height !== height) {
    const detail =
      `The ground truth has ${truth.width} × ${truth.height} pixels, the images have ` +
      `${width} × ${height}. Choose the file of these images.`;
    showProblem(new Problem({ field: "truth", detail }));
    return;
  }
  const errors = compare(shown.response.flow, truth);
  viewer.setErrors(errors.error, errorMap(errors, truth));
  $("accuracy").textContent =
    `EPE ${errors.epe.toFixed(2)} px, Fl ${(100 * errors.outliers).toFixed(1)} %`;
}

function clearProblems() {
  for (const place of all(".problem")) place.textContent = "";
  for (const control of all("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

/** Show a problem beside the field at fault, or at the end of the form. */
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

/** Fill the list of networks; try again until the service has loaded one. */
async function loadModels() {
  try {
    served = await models();
    $("service").textContent = served.length ? "Ready" : "Loading the model…";
  } catch (error) {
    served = [];
    $("service").textContent = error.status === 401 ? "API key required" : "Not reachable";
    if (error.status === 401) {
      showProblem(error);
      return;
    }
  } finally {
    document.body.classList.toggle("ready", served.length > 0);
  }
  clearTimeout(retry);
  if (!served.length) {
    retry = setTimeout(loadModels, 3000);
    return;
  }
  $("model").replaceChildren(
    ...served.map((model) => {
      const option = new Option(optionText(model), model.name, model.default, model.default);
      option.title = model.weights_license ? `Weights: ${model.weights_license}` : "";
      return option;
    }),
  );
}

/** Return the text of a network in the list, with its limit of pixels if it has one. */
function optionText({ name, network, max_pixels: limit }) {
  const text = network ? `${network} (${name})` : name;
  return limit ? `${text}, up to ${(limit / 1e6).toFixed(1)} megapixels` : text;
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
  control.addEventListener("change", () => isPlaying() || run());
}

// Images

/** Set the image of one side, and drop the sample and the ground truth of another pair. */
function setImage(side, file) {
  if (isSample) pair = [null, null];
  isSample = false;
  pair[side] = { blob: file, name: file.name };
  setTruth(null, "");
}

function setTruth(read, name) {
  truth = read;
  $("truth-name").textContent = name || "Ground truth (optional)";
}

/** Read a file of ground truth, and compare the flow on display with it. */
async function openTruth(file) {
  clearProblems();
  setTruth(null, "");
  try {
    setTruth(await readTruth(file), file.name);
  } catch (error) {
    showProblem(new Problem({ field: "truth", detail: error.message }));
  }
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

$("truth").addEventListener("change", async ({ target }) => {
  if (!target.files.length) return;
  await openTruth(target.files[0]);
  target.value = "";
  if (shown) showErrors();
});

$("swap").addEventListener("click", () => {
  pair.reverse();
  setTruth(null, "");
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

/**
 * Open dropped files: a video; or two images in the order of their names, or one for a side, and
 * the ground truth of the pair.
 */
async function take(event, side) {
  event.preventDefault();
  event.stopPropagation();
  document.body.classList.remove("dragging");
  const files = [...event.dataTransfer.files];
  const film = files.find(({ type }) => type.startsWith("video/"));
  if (film) {
    showPanel("video");
    await openVideo(film);
    return;
  }
  if (!files.length) return;
  showPanel("files");
  const found = await Promise.all(files.map(isTruth));
  // Several PNG files of 16 bits are images.
  const truthFile = found.filter(Boolean).length === 1 ? files[found.indexOf(true)] : null;
  const images = files.filter((file) => file !== truthFile);
  images.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  if (images.length > 1 || (images.length && side === undefined && pair.every(Boolean))) {
    pair = [null, null];
  }
  const first = images.length > 1 ? 0 : (side ?? pair.indexOf(null));
  images.slice(0, 2).forEach((file, i) => setImage(first + i, file));
  if (truthFile) await openTruth(truthFile);
  if (images.length) run();
  else if (shown) showErrors();
}

connect({
  run: (frames) => {
    pair = frames;
    isSample = false;
    setTruth(null, "");
    return run();
  },
  problem: showProblem,
  clear: clearProblems,
  stopped: showSlots,
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
    errors: chosen("result") === "errors",
  });
}

for (const control of all('#arrows, #occluded, #blend, input[name="second"], input[name="result"]')) {
  control.addEventListener("input", showOptions);
}
$("occluded").addEventListener("change", ({ target }) => {
  if (target.checked && !shown?.response.occluded && !isPlaying()) run();
});
showOptions(); // browsers keep the state of controls when a page is reloaded

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

// The sample

async function open() {
  const { image1, image2, model, response } = await sample();
  if (!isSample) return;
  pair = [image1, image2];
  showSlots();
  const asked = { ...request(), size: "native", both: true, model: "" };
  const [first, second] = await Promise.all(pair.map(decode));
  display({ asked, response, image1: first, image2: second, model }, "computed beforehand");
  $("status").textContent = "A sample, computed beforehand.";
}

loadModels();
open();
