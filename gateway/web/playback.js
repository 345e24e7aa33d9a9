// The panels of the video and the camera: stepping through frames, and live pairs.

import { Problem } from "./api.js";
import { $, all } from "./dom.js";
import { Camera, Video } from "./video.js";

let video = null; // the opened Video
let source = null; // the Video or Camera that plays
let page; // what main.js does for these panels: run(pair), problem(error), clear(), stopped()

/** Return true while a video or the camera plays. */
export const isPlaying = () => source !== null;

/** Connect the controls; `callbacks` are the functions of `page`. */
export function connect(callbacks) {
  page = callbacks;
  for (const input of all('input[name="source"]')) {
    input.addEventListener("change", () => showPanel(input.value));
  }
  $("video-file").addEventListener("change", ({ target }) => {
    if (target.files.length) openVideo(target.files[0]);
  });
  $("previous").addEventListener("click", () => showFrame(frame() - 1));
  $("next").addEventListener("click", () => showFrame(frame() + 1));
  $("frame").addEventListener("change", () => showFrame(frame()));
  $("step").addEventListener("change", () => showFrame(frame()));
  $("play").addEventListener("click", toggleVideo);
  $("live").addEventListener("click", toggleCamera);
}

/** Show the panel of images, video or camera. */
export function showPanel(name) {
  document.querySelector(`input[name="source"][value="${name}"]`).checked = true;
  for (const panel of all("[data-source]")) panel.hidden = panel.dataset.source !== name;
  stop();
}

/** Open a video file and estimate the flow of its first pair. */
export async function openVideo(file) {
  stop();
  page.clear();
  video?.close();
  video = null;
  try {
    video = await Video.open(file, $("video"));
  } catch (error) {
    return page.problem(new Problem({ field: "video", detail: error.message }));
  }
  $("video-name").textContent = file.name;
  $("steps").hidden = false;
  await showFrame(0);
}

const frame = () => Number($("frame").value);

/** Estimate the flow from one frame to the frame `step` later; true to go on playing. */
async function showFrame(index) {
  const step = Math.max(1, Math.min(Math.round(Number($("step").value)), video.length - 1));
  const last = Math.max(0, video.length - 1 - step);
  const first = Math.min(Math.max(index, 0), last);
  $("frame").max = last;
  $("frame").value = first;
  $("frame-name").textContent = `${first} → ${first + step} of ${video.length}`;
  const pair = await Promise.all([video.frame(first), video.frame(first + step)]);
  return frame() === first ? page.run(pair) : true; // the user may have moved on
}

/** Estimate pair after pair, as fast as the service responds, until stopped. */
async function play(played, button, advance) {
  source = played;
  $("status").setAttribute("aria-live", "off"); // screen readers must not read out every pair
  button.setAttribute("aria-pressed", "true");
  while (source === played && (await advance()));
  if (source === played) stop();
}

function stop() {
  if (source instanceof Camera) source.close();
  source = null;
  page.stopped();
  $("status").removeAttribute("aria-live");
  $("camera").hidden = true;
  $("live").textContent = "Start the camera";
  $("play").textContent = "Play";
  for (const button of [$("play"), $("live")]) button.setAttribute("aria-pressed", "false");
}

function toggleVideo() {
  if (source) return stop();
  $("play").textContent = "Pause";
  return play(video, $("play"), async () => {
    if (frame() >= Number($("frame").max)) return false;
    return showFrame(frame() + 1);
  });
}

async function toggleCamera() {
  if (source) return stop();
  page.clear();
  let camera;
  try {
    camera = await Camera.open($("camera"));
  } catch (error) {
    return page.problem(new Problem({ field: "camera", detail: error.message }));
  }
  $("camera").hidden = false;
  $("live").textContent = "Stop the camera";
  return play(camera, $("live"), async () => page.run(await camera.pair()));
}
