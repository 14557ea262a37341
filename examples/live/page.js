// Shows what serve.py tells: plans once, then an event per step of a drawing.

const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const CELL = 16;
const LEFT = 20;
const ACTIONS = {
  full: "full: everything",
  asc: "asc: conditional half only",
  "wa-rs": "wa-rs: window and cached residual",
  "wa-rs+asc": "both",
  ast: "ast: the output of an earlier step",
};
// In the order in which they say whether the plan is followed.
const COUNTERS = ["steps", "layers_full", "layers_window", "layers_halved", "layers_reused", "misses", "recomputes", "dense_steps", "live_requests", "bytes", "peak_bytes"];

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const kind = (action) => action.replace("+", "-");

let plans = {};
let source = null;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function showPlan() {
  const plan = plans[at("plan").value];
  const layers = plan.steps[0].length;
  const map = at("map");
  map.setAttribute("viewBox", `0 0 ${LEFT + plan.steps.length * CELL + 2} ${(layers + 1) * CELL}`);
  map.replaceChildren();
  plan.steps.forEach((row, step) => {
    row.forEach((action, layer) => {
      const cell = element("rect", { x: LEFT + step * CELL, y: layer * CELL, width: CELL - 1, height: CELL - 1, class: kind(action) });
      cell.append(element("title", {}, `step ${step}, layer ${layer}: ${action}`));
      map.append(cell);
    });
    if (step % 5 === 0) map.append(element("text", { x: LEFT + step * CELL, y: layers * CELL + 11 }, step));
  });
  for (let layer = 0; layer < layers; layer++) map.append(element("text", { x: 0, y: layer * CELL + 12 }, layer));
  map.append(element("rect", { id: "now", class: "now", y: 0, width: CELL, height: layers * CELL, visibility: "hidden" }));
  at("attention").textContent = percent(plan.attention_saved);
  at("module").textContent = percent(plan.module_saved);
}

function paint(id, pixels) {
  const bytes = Uint8Array.from(atob(pixels), (c) => c.charCodeAt(0));
  const canvas = at(id);
  const image = new ImageData(canvas.width, canvas.height);
  bytes.forEach((grey, i) => image.data.set([grey, grey, grey, 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showStep(event) {
  const { step, seconds, psnr, counters } = event;
  for (const id of ["dense", "planned", "difference"]) paint(id, event[id]);
  at("now").setAttribute("x", LEFT + step * CELL - 0.5);
  at("now").setAttribute("visibility", "visible");
  at("dense-time").textContent = `${seconds.dense.toFixed(2)} s`;
  at("planned-time").textContent = `${seconds.planned.toFixed(2)} s`;
  at("time").textContent = percent(seconds.planned / seconds.dense);
  at("psnr").textContent = psnr === null ? "equal" : `${psnr.toFixed(1)} dB`;
  at("status").textContent = `step ${step + 1} of ${plans[at("plan").value].steps.length}`;
  at("counters").replaceChildren(
    ...COUNTERS.map((name) => {
      const row = document.createElement("tr");
      for (const text of [name, counters[name].toLocaleString("en")]) row.append(Object.assign(document.createElement("td"), { textContent: text }));
      return row;
    }),
  );
}

function busy(now) {
  at("draw").disabled = at("plan").disabled = at("seed").disabled = now;
  at("stop").disabled = !now;
}

function finish(text) {
  source?.close();
  source = null;
  busy(false);
  at("status").textContent = text;
}

function draw(submit) {
  submit.preventDefault();
  busy(true);
  at("status").textContent = "loading";
  source = new EventSource(`draw?${new URLSearchParams({ plan: at("plan").value, seed: at("seed").value })}`);
  source.addEventListener("step", (event) => showStep(JSON.parse(event.data)));
  source.addEventListener("done", () => finish("done"));
  source.addEventListener("failed", (event) => finish(JSON.parse(event.data).message));
  source.onerror = () => finish("the server does not answer");
}

plans = await (await fetch("plans")).json();
for (const [id, plan] of Object.entries(plans)) {
  const delta = plan.delta === null ? "" : ` (δ ${plan.delta})`;
  at("plan").append(new Option(plan.name + delta, id));
}
for (const [action, text] of Object.entries(ACTIONS)) {
  const item = document.createElement("li");
  item.append(Object.assign(document.createElement("i"), { className: kind(action) }), text);
  at("legend").append(item);
}
at("plan").addEventListener("change", showPlan);
at("controls").addEventListener("submit", draw);
at("stop").addEventListener("click", () => finish("stopped"));
showPlan();
at("status").textContent = "ready";
