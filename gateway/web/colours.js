// Middlebury's flow colours, as in flownet2.colours: hue is direction, white is no motion, full
// colour is `maximum` pixels, longer vectors are darker.

// Steps of the colour circle of Baker et al., "A Database and Evaluation Methodology for Optical
// Flow" (IJCV 2011): from each of the six pure colours to the next.
const STEPS = [
  [[255, 0, 0], 15],
  [[255, 255, 0], 6],
  [[0, 255, 0], 4],
  [[0, 255, 255], 11],
  [[0, 0, 255], 13],
  [[255, 0, 255], 6],
];

const CIRCLE = STEPS.flatMap(([start, count], i) => {
  const [end] = STEPS[(i + 1) % STEPS.length];
  return Array.from({ length: count }, (_, step) =>
    start.map((value, c) => (value + Math.trunc(((end[c] - value) * step) / count)) / 255),
  );
});

/** Return the length of the longest vector of a flow, in pixels. */
export function longest({ data }) {
  let square = 0;
  for (let i = 0; i < data.length; i += 2) {
    square = Math.max(square, data[i] * data[i] + data[i + 1] * data[i + 1]);
  }
  return Math.sqrt(square);
}

/** Return a flow as an opaque ImageData of its own size. */
export function colourise({ width, height, data }, maximum) {
  const image = new ImageData(width, height);
  const pixels = image.data;
  const scale = 1 / Math.max(maximum, 1e-30);
  for (let i = 0; i < data.length; i += 2) {
    const [u, v] = [data[i], data[i + 1]];
    const radius = Math.sqrt(u * u + v * v) * scale;
    const place = ((Math.atan2(-v, -u) / Math.PI + 1) / 2) * (CIRCLE.length - 1);
    const low = Math.floor(place);
    const share = place - low;
    const [from, to] = [CIRCLE[low], CIRCLE[(low + 1) % CIRCLE.length]];
    for (let c = 0; c < 3; c += 1) {
      const full = from[c] + share * (to[c] - from[c]);
      const shade = radius <= 1 ? 1 - radius * (1 - full) : full * 0.75;
      pixels[2 * i + c] = Math.trunc(shade * 255);
    }
    pixels[2 * i + 3] = 255;
  }
  return image;
}

/** Return the legend: a disc of `size` pixels that shows every direction and length. */
export function wheel(size) {
  const data = new Float32Array(2 * size * size);
  const middle = (size - 1) / 2;
  for (let y = 0; y < size; y += 1) {
    for (let x = 0; x < size; x += 1) {
      data.set([(x - middle) / middle, (y - middle) / middle], 2 * (y * size + x));
    }
  }
  return colourise({ width: size, height: size, data }, 1);
}
