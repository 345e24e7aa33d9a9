// NumPy's .npy and .npz files, and Middlebury's .flo.

const TYPES = {
  "<f4": Float32Array,
  "<f8": Float64Array,
  "|b1": Uint8Array,
  "|u1": Uint8Array,
};

/** Read a .npy file (format 1 to 3, C order): its `shape` and its `data`, a typed array. */
export function parseNpy(buffer) {
  const view = new DataView(buffer);
  if (view.getUint32(0) !== 0x934e554d) throw new Error("This is not a .npy file.");
  const long = view.getUint8(6) > 1;
  const start = long ? 12 : 10;
  const end = start + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(buffer.slice(start, end));
  const [, type] = header.match(/'descr': '([^']+)'/);
  const [, sides] = header.match(/'shape': \(([^)]*)\)/);
  if (!(type in TYPES) || header.includes("'fortran_order': True")) {
    throw new Error(`Arrays of this type are not supported: ${header.trim()}`);
  }
  const shape = sides.split(",").filter((side) => side.trim()).map(Number);
  return { shape, data: new TYPES[type](buffer.slice(end)) };
}

/** Read a .npz file; gives the result of `parseNpy` by name of the array. */
export async function parseNpz(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (view.getUint32(end, true) !== 0x06054b50) end -= 1; // a comment may follow
  const arrays = {};
  let entry = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count -= 1) {
    const [method, size] = [view.getUint16(entry + 10, true), view.getUint32(entry + 20, true)];
    const [name, extra, comment] = [28, 30, 32].map((at) => view.getUint16(entry + at, true));
    const local = view.getUint32(entry + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const file = new TextDecoder().decode(buffer.slice(entry + 46, entry + 46 + name));
    const content = buffer.slice(start, start + size);
    arrays[file.replace(/\.npy$/, "")] = parseNpy(method ? await inflate(content) : content);
    entry += 46 + name + extra + comment;
  }
  return arrays;
}

function inflate(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

/** Return a flow as a .npy file, float32 [height, width, 2]. */
export function toNpy({ width, height, data }) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${height}, ${width}, 2), }`;
  const padded = `${header.padEnd(117)}\n`; // 10 + 118 bytes, a multiple of 64
  const magic = new Uint8Array([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, padded.length, 0]);
  return new Blob([magic, padded, data]);
}

/** Return a flow as a Middlebury .flo file: "PIEH", width, height, then u and v in turns. */
export function toFlo({ width, height, data }) {
  return new Blob(["PIEH", new Int32Array([width, height]), data]);
}
