// Text and figures about a response.

const STAGES = {
  read: "receive",
  decode: "decode",
  resize: "resize",
  queue: "wait",
  infer: "network",
  encode: "encode",
};

/** Fill a `<dl>` with `[term, description, class]`. */
function terms(list, entries) {
  list.replaceChildren(
    ...entries.map(([term, description, kind]) => {
      const group = document.createElement("div");
      const [dt, dd] = ["dt", "dd"].map((tag) => group.appendChild(document.createElement(tag)));
      [dt.textContent, dd.textContent, group.className] = [term, description, kind ?? ""];
      return group;
    }),
  );
}

/** Fill a list with the network, its weights and licence, and the size of the flow. */
export function showModel(list, model, { width, height }, roundTrip) {
  const millions = model.parameters && `${(model.parameters / 1e6).toFixed(1)} million weights`;
  terms(list, [
    ["Network", [model.network ?? model.name, millions].filter(Boolean).join(", ")],
    ["Weights", model.weights_source ?? "of unknown origin"],
    ["Licence", model.weights_license ?? "unknown"],
    ["Flow", `${width} × ${height}, ${roundTrip}`],
  ]);
}

/** Show the milliseconds of each stage as a bar and a list; stages are `[name, milliseconds]`. */
export function showStages({ bar, list, total }, stages) {
  const all = Object.fromEntries(stages);
  const rows = Object.keys(STAGES).filter((name) => name in all);
  total.textContent = all.total?.toFixed(0) ?? "";
  bar.replaceChildren(
    ...rows.map((name) => {
      const part = document.createElement("span");
      part.className = name;
      part.style.flexGrow = all[name];
      return part;
    }),
  );
  terms(
    list,
    rows.map((name) => [STAGES[name], all[name].toFixed(1), name]),
  );
}

function signed(value) {
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

/** Return the text for one pixel; see `Viewer.at`. */
export function readout({ x, y, u, v, occluded, error }) {
  const parts = [
    `x ${x}, y ${y}`,
    `u ${signed(u)}`,
    `v ${signed(v)}`,
    `length ${Math.hypot(u, v).toFixed(2)} px`,
    ...(occluded ? ["occluded"] : []),
    ...(Number.isNaN(error) ? [] : [`error ${error.toFixed(2)} px`]),
  ];
  return parts.join(" · ");
}
