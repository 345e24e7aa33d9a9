// Ground truth: reading of .flo files and KITTI's PNG, and the errors of a flow.

import { sampler } from "./view.js";

const SIGNATURE = [0x89504e47, 0x0d0a1a0a];
const UNKNOWN = 1e9; // larger components mark unknown pixels in .flo files

/** Return true if a file holds ground truth: .flo, or a PNG of RGB with 16 bits as KITTI's. */
export async function isTruth(file) {
  const view = new DataView(await file.slice(0, 26).arrayBuffer());
  if (view.byteLength < 12) return false;
  if (view.getUint32(0) === 0x50494548) return true; // "PIEH"
  return view.byteLength === 26 && isPng(view) && view.getUint16(24) === 0x1002;
}

/**
 * Read ground truth.
 *
 * Gives `width`, `height`, `data` (u and v in turns, in pixels) and `known` (one byte a pixel).
 */
export async function readTruth(file) {
  const buffer = await file.arrayBuffer();
  const view = new DataView(buffer);
  return isPng(view) ? readKitti(buffer, view) : readFlo(buffer, view);
}

function isPng(view) {
  return SIGNATURE.every((word, i) => view.getUint32(4 * i) === word);
}

function readFlo(buffer, view) {
  const [width, height] = [view.getInt32(4, true), view.getInt32(8, true)];
  if (buffer.byteLength !== 12 + 8 * width * height) throw new Error("The .flo file is incomplete.");
  const data = new Float32Array(buffer.slice(12));
  const known = new Uint8Array(width * height);
  for (let i = 0; i < known.length; i += 1) {
    known[i] = Math.abs(data[2 * i]) < UNKNOWN && Math.abs(data[2 * i + 1]) < UNKNOWN ? 1 : 0;
  }
  return { width, height, data, known };
}

async function readKitti(buffer, view) {
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  if (view.getUint8(28)) throw new Error("Interlaced PNG files of ground truth are not supported.");
  const parts = [];
  for (let at = 8; at + 12 <= buffer.byteLength; at += 12 + view.getUint32(at)) {
    const start = at + 8;
    if (view.getUint32(at + 4) === 0x49444154) parts.push(buffer.slice(start, start + view.getUint32(at)));
  }
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = unfilter(new Uint8Array(await new Response(stream).arrayBuffer()), width, height);
  const data = new Float32Array(2 * width * height);
  const known = new Uint8Array(width * height);
  for (let i = 0, at = 0; i < known.length; i += 1, at += 6) {
    const [u, v, valid] = [0, 2, 4].map((c) => (rows[at + c] << 8) | rows[at + c + 1]);
    data[2 * i] = (u - 32768) / 64;
    data[2 * i + 1] = (v - 32768) / 64;
    known[i] = valid ? 1 : 0;
  }
  return { width, height, data, known };
}

/** Undo PNG's filters of RGB with 16 bits; gives the bytes of all rows. */
function unfilter(filtered, width, height) {
  const [step, length] = [6, 6 * width];
  if (filtered.length < (length + 1) * height) throw new Error("The PNG file is incomplete.");
  const rows = new Uint8Array(length * height);
  for (let y = 0; y < height; y += 1) {
    const kind = filtered[y * (length + 1)];
    const [from, to] = [y * (length + 1) + 1, y * length];
    for (let x = 0; x < length; x += 1) {
      const left = x >= step ? rows[to + x - step] : 0;
      const up = y ? rows[to + x - length] : 0;
      const corner = y && x >= step ? rows[to + x - length - step] : 0;
      const predicted = [0, left, up, (left + up) >> 1, paeth(left, up, corner)][kind];
      rows[to + x] = filtered[from + x] + predicted;
    }
  }
  return rows;
}

function paeth(left, up, corner) {
  const guess = left + up - corner;
  const [a, b, c] = [left, up, corner].map((value) => Math.abs(guess - value));
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}

/**
 * Compare a flow with ground truth, at the pixels where that is known.
 *
 * Gives `error` (end-point error a pixel, NaN where unknown), `epe` (its mean, in pixels) and
 * `outliers` (Fl: the share of pixels that are off by more than 3 px and by more than 5 %).
 */
export function compare(flow, truth) {
  const { width, height } = truth;
  const sample = sampler(flow, width, height);
  const error = new Float32Array(width * height).fill(NaN);
  let [sum, wrong, count] = [0, 0, 0];
  for (let i = 0; i < error.length; i += 1) {
    if (!truth.known[i]) continue;
    const [u, v] = [truth.data[2 * i], truth.data[2 * i + 1]];
    const found = sample(i % width, Math.floor(i / width));
    error[i] = Math.hypot(found[0] - u, found[1] - v);
    sum += error[i];
    wrong += error[i] > 3 && error[i] > 0.05 * Math.hypot(u, v) ? 1 : 0;
    count += 1;
  }
  return { width, height, error, epe: sum / count, outliers: wrong / count };
}

// The colours of KITTI's development kit: upper bounds of the error, in units of 3 px or 5 % of the
// true motion, whichever is larger. From the sixth colour on a pixel counts as an outlier.
const COLOURS = [
  [0.0625, [49, 54, 149]],
  [0.125, [69, 117, 180]],
  [0.25, [116, 173, 209]],
  [0.5, [171, 217, 233]],
  [1, [224, 243, 248]],
  [2, [254, 224, 144]],
  [4, [253, 174, 97]],
  [8, [244, 109, 67]],
  [16, [215, 48, 39]],
  [Infinity, [165, 0, 38]],
];

/** The errors as an ImageData; pixels without ground truth are black. */
export function errorMap({ width, height, error }, truth) {
  const image = new ImageData(width, height);
  for (let i = 0; i < error.length; i += 1) {
    image.data[4 * i + 3] = 255;
    if (!truth.known[i]) continue;
    const unit = Math.max(3, 0.05 * Math.hypot(truth.data[2 * i], truth.data[2 * i + 1]));
    const [, colour] = COLOURS.find(([bound]) => error[i] / unit <= bound);
    image.data.set(colour, 4 * i);
  }
  return image;
}
