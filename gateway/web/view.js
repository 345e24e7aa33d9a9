// The two pictures of a response: the flow in colours or its errors, and the two images.

import { colourise, longest, wheel } from "./colours.js";

const LARGEST = 1600; // longest edge at which images are shown, in pixels
const ARROW_SPACING = 26; // CSS pixels
const RING = 5; // radius of the crosshair, CSS pixels

/** A canvas with something drawn on it. */
function layer(width, height, draw) {
  const canvas = new OffscreenCanvas(width, height);
  draw(canvas.getContext("2d", { willReadFrequently: true }));
  return canvas;
}

function pixels(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
}

/**
 * Return a function that gives u and v, bilinear, at a pixel of an image of another size, whose
 * outer edges coincide with those of the flow.
 */
export function sampler(flow, width, height) {
  const [stepX, stepY] = [flow.width / width, flow.height / height];
  const row = 2 * flow.width;
  return (x, y) => {
    const gridX = Math.min(Math.max((x + 0.5) * stepX - 0.5, 0), flow.width - 1);
    const gridY = Math.min(Math.max((y + 0.5) * stepY - 0.5, 0), flow.height - 1);
    const [left, top] = [Math.floor(gridX), Math.floor(gridY)];
    const [p, q] = [gridX - left, gridY - top];
    const at = top * row + 2 * left;
    const right = left + 1 < flow.width ? 2 : 0;
    const down = top + 1 < flow.height ? row : 0;
    const value = (c) =>
      (1 - q) * ((1 - p) * flow.data[at + c] + p * flow.data[at + right + c]) +
      q * ((1 - p) * flow.data[at + down + c] + p * flow.data[at + down + right + c]);
    return [value(0), value(1)];
  };
}

/**
 * Warp image 2 back onto image 1: at every pixel x, image 2 at x + flow(x), both bilinear;
 * transparent where that is outside of image 2.
 *
 * `scale` is the size of `image2` divided by that of the images in whose pixels the flow is.
 */
export function warp(image2, flow, scale) {
  const { width, height } = image2;
  const source = pixels(image2);
  const target = new ImageData(width, height);
  const sample = sampler(flow, width, height);
  for (let y = 0, out = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, out += 4) {
      const [u, v] = sample(x, y);
      const [sx, sy] = [x + u * scale, y + v * scale];
      if (sx < 0 || sy < 0 || sx > width - 1 || sy > height - 1) continue;
      const [x0, y0] = [Math.floor(sx), Math.floor(sy)];
      const [a, b] = [sx - x0, sy - y0];
      const corner = 4 * (y0 * width + x0);
      const [east, south] = [x0 + 1 < width ? 4 : 0, y0 + 1 < height ? 4 * width : 0];
      for (let c = 0; c < 4; c += 1) {
        target.data[out + c] =
          (1 - b) * ((1 - a) * source[corner + c] + a * source[corner + east + c]) +
          b * ((1 - a) * source[corner + south + c] + a * source[corner + south + east + c]);
      }
    }
  }
  return layer(width, height, (context) => context.putImageData(target, 0, 0));
}

/** Shows a response on two canvases, with one crosshair. `options` says what is shown. */
export class Viewer {
  options = {
    blend: 0,
    warped: true,
    arrows: true,
    occluded: false,
    maximum: null,
    errors: false,
  };
  #point = null; // the crosshair, as shares of the width and the height
  #errors = null; // against ground truth, at the images' size

  /** `onPoint` is called with the result of `at`, or null, when the crosshair has moved. */
  constructor({ flow, images, legend }, onPoint) {
    this.canvases = { flow, images };
    this.legend = legend;
    this.onPoint = onPoint;
    const disc = wheel(192);
    this.disc = layer(192, 192, (context) => context.putImageData(disc, 0, 0));
    for (const canvas of [flow, images]) {
      new ResizeObserver(() => this.draw()).observe(canvas);
      for (const kind of ["pointermove", "pointerdown"]) {
        canvas.addEventListener(kind, (event) => this.#follow(event));
      }
      canvas.addEventListener("pointerleave", ({ pointerType }) => {
        if (pointerType === "mouse") this.#moveTo(null);
      });
      canvas.addEventListener("keydown", (event) => this.#step(event));
    }
  }

  /** Show a response; an image that the browser cannot decode is null. */
  show({ image1, image2, flow, occluded }) {
    const { width, height } = image1 ?? image2 ?? flow;
    this.size = { width, height };
    this.flow = flow;
    this.longest = longest(flow);
    const scale = Math.min(1, LARGEST / Math.max(width, height));
    const fit = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
    [this.first, this.second] = [image1, image2].map((image) =>
      layer(...fit, (context) => image && context.drawImage(image, 0, 0, ...fit)),
    );
    this.back = warp(this.second, flow, scale);
    this.mask = occluded && this.#maskOf(occluded);
    for (const canvas of Object.values(this.canvases)) {
      canvas.style.setProperty("--aspect", width / height);
    }
    this.#errors = null;
    this.#colour();
    this.#moveTo(this.#point);
  }

  /** Show errors in place of the flow while `options.errors`: an array, one a pixel, and a picture. */
  setErrors(error, image) {
    const picture = layer(image.width, image.height, (context) => context.putImageData(image, 0, 0));
    this.#errors = { ...this.size, error, picture };
    this.#moveTo(this.#point);
  }

  /** Change some of the options. */
  set(options) {
    const colours = "maximum" in options && options.maximum !== this.options.maximum;
    Object.assign(this.options, options);
    if (!this.flow) return;
    if (colours) this.#colour();
    this.draw();
  }

  /** Pixels that the full colour stands for. */
  get maximum() {
    return this.options.maximum ?? this.longest;
  }

  /** The flow in colours at its own size, as a PNG file. */
  picture() {
    return this.coloured.convertToBlob({ type: "image/png" });
  }

  /** The pixel of image 1 under the crosshair, and its flow. */
  at([shareX, shareY]) {
    const { width, height, data } = this.flow;
    const [column, row] = [Math.floor(shareX * width), Math.floor(shareY * height)];
    const [u, v] = data.subarray(2 * (row * width + column));
    const [x, y] = [shareX * this.size.width, shareY * this.size.height].map(Math.floor);
    return {
      x,
      y,
      u,
      v,
      error: this.#errors?.error[y * this.size.width + x] ?? NaN,
      occluded: this.mask ? this.mask.bytes[row * width + column] > 0 : null,
    };
  }

  #colour() {
    const { width, height } = this.flow;
    const image = colourise(this.flow, this.maximum);
    this.coloured = layer(width, height, (context) => context.putImageData(image, 0, 0));
  }

  #maskOf(bytes) {
    const { width, height } = this.flow;
    const image = new ImageData(width, height);
    for (let i = 0; i < bytes.length; i += 1) image.data[4 * i + 3] = bytes[i] ? 255 : 0;
    return { bytes, shape: layer(width, height, (context) => context.putImageData(image, 0, 0)) };
  }

  #follow(event) {
    if (!this.flow) return;
    const box = event.currentTarget.getBoundingClientRect();
    const share = [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height];
    this.#moveTo(share.map((value) => Math.min(Math.max(value, 0), 1 - 1e-9)));
  }

  #step(event) {
    const turns = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") this.#moveTo(null);
    if (!(event.key in turns) || !this.flow) return;
    event.preventDefault();
    const sides = [this.size.width, this.size.height];
    this.#moveTo(
      turns[event.key].map((turn, i) => {
        const pixel = Math.floor((this.#point?.[i] ?? 0.5) * sides[i]);
        const moved = pixel + turn * (event.shiftKey ? 10 : 1);
        return (Math.min(Math.max(moved, 0), sides[i] - 1) + 0.5) / sides[i];
      }),
    );
  }

  #moveTo(point) {
    this.#point = point;
    this.draw();
    this.onPoint(point && this.at(point));
  }

  /** Draw everything again. */
  draw() {
    if (!this.flow) return;
    this.#paint(this.canvases.flow, (context, width, height) => {
      const errors = this.options.errors && this.#errors;
      context.drawImage(errors ? errors.picture : this.coloured, 0, 0, width, height);
      if (this.options.arrows && !errors) this.#arrows(context, width, height);
    });
    this.#paint(this.canvases.images, (context, width, height) => {
      const { blend, warped } = this.options;
      context.globalAlpha = 1 - blend;
      context.drawImage(this.first, 0, 0, width, height);
      context.globalCompositeOperation = "lighter"; // the two shares add up
      context.globalAlpha = blend;
      context.drawImage(warped ? this.back : this.second, 0, 0, width, height);
      context.globalCompositeOperation = "source-over";
      context.globalAlpha = 1;
    });
    this.#paintLegend();
  }

  /** Draw on a canvas in CSS pixels, with the overlays that both pictures have. */
  #paint(canvas, draw) {
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingQuality = "high";
    draw(context, width, height);
    if (this.options.occluded && this.mask) this.#hatch(context, width, height);
    if (this.#point) this.#cross(context, width, height);
  }

  #arrows(context, width, height) {
    const [columns, rows] = [width, height].map((side) =>
      Math.max(1, Math.round(side / ARROW_SPACING)),
    );
    const scale = (ARROW_SPACING * 0.95) / Math.max(this.maximum, 1e-30);
    context.beginPath();
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const share = [(column + 0.5) / columns, (row + 0.5) / rows];
        const { u, v } = this.at(share);
        const [x, y] = [share[0] * width, share[1] * height];
        arrow(context, x, y, x + u * scale, y + v * scale);
      }
    }
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "rgb(20 22 30 / 72%)";
    context.lineWidth = 1.25;
    context.stroke();
  }

  #hatch(context, width, height) {
    const ratio = window.devicePixelRatio;
    const stripes = layer(width * ratio, height * ratio, (over) => {
      over.scale(ratio, ratio);
      over.drawImage(this.mask.shape, 0, 0, width, height);
      over.globalCompositeOperation = "source-in";
      over.fillStyle = "rgb(20 22 30 / 45%)";
      over.fillRect(0, 0, width, height);
      over.globalCompositeOperation = "source-atop";
      over.beginPath();
      for (let x = -height; x < width; x += 6) {
        over.moveTo(x, height);
        over.lineTo(x + height, 0);
      }
      over.strokeStyle = "rgb(255 255 255 / 85%)";
      over.lineWidth = 1.5;
      over.stroke();
    });
    context.drawImage(stripes, 0, 0, width, height);
  }

  /** The pixel, and a line from it to where it moves. */
  #cross(context, width, height) {
    const { u, v } = this.at(this.#point);
    const [x, y] = [this.#point[0] * width, this.#point[1] * height];
    const scale = width / this.size.width;
    context.beginPath();
    context.arc(x, y, RING, 0, 2 * Math.PI);
    if (Math.hypot(u, v) * scale > 2 * RING) arrow(context, x, y, x + u * scale, y + v * scale);
    for (const [colour, thickness] of [["white", 4], ["black", 1.75]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness;
      context.stroke();
    }
  }

  /** The colour circle, with a mark at the vector under the crosshair. */
  #paintLegend() {
    const { width } = this.legend;
    const context = this.legend.getContext("2d");
    context.clearRect(0, 0, width, width);
    context.drawImage(this.disc, 0, 0, width, width);
    if (!this.#point) return;
    const { u, v } = this.at(this.#point);
    const length = Math.max(Math.hypot(u, v), this.maximum, 1e-30);
    context.beginPath();
    context.arc(...[u, v].map((value) => (value / length / 2 + 0.5) * width), 8, 0, 2 * Math.PI);
    context.lineWidth = 4;
    context.stroke();
  }
}

/** Add an arrow to the current path; its head is in proportion. */
function arrow(context, x, y, toX, toY) {
  const length = Math.hypot(toX - x, toY - y);
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  if (length < 2) return;
  const head = Math.min(6, length * 0.4);
  const angle = Math.atan2(toY - y, toX - x);
  for (const turn of [2.6, -2.6]) {
    context.moveTo(toX, toY);
    context.lineTo(toX + head * Math.cos(angle + turn), toY + head * Math.sin(angle + turn));
  }
}
