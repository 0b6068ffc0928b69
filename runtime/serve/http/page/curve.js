// Editor of guidance plans: points over the steps, x in 0..1, y the weight. Lines give a number for each step, stairs give
// windows; both are written in the grammar of docs/guidance.md.

const $ = (id) => document.getElementById(id);

const svg = $("curve"), plan = $("guidance"), steps = $("steps");
const LEFT = 26, RIGHT = 470, TOP = 10, BOTTOM = 128;
let points = [{ x: 0, y: 3 }, { x: 1, y: 3 }];
let stairs = false, held = null;
let named = ""; // text of a curve that has a name of its own in the grammar, until a point is moved

const count = () => Math.min(Math.max(Math.round(+steps.value) || 1, 1), 1000);
const ceiling = () => Math.max(10, ...points.map(({ y }) => Math.ceil(y)));
const px = (x) => LEFT + x * (RIGHT - LEFT);
const py = (y) => BOTTOM - (y / ceiling()) * (BOTTOM - TOP);
const short = (value) => String(+value.toFixed(2));
const handles = () => (stairs ? points.slice(0, -1) : points);

function weight(x) {
  const next = Math.max(1, points.findIndex((point) => point.x > x));
  const [a, b] = points.at(-1).x <= x ? points.slice(-2) : points.slice(next - 1, next + 1);
  if (stairs) return a.y;
  return a.y + ((x - a.x) / (b.x - a.x)) * (b.y - a.y);
}

/** Text of the plan in the grammar of docs/guidance.md. */
function written() {
  const shown = handles(), n = count();
  if (named) return named;
  if (shown.every(({ y }) => y === shown[0].y)) return short(shown[0].y);
  if (stairs) return shown.map(({ x, y }, i) => `${short(y)}@${short(x)}-${short(points[i + 1].x)}`).join(",");
  if (shown.length === 2) return `linear(${short(shown[0].y)}..${short(shown[1].y)})`;
  return `[${Array.from({ length: n }, (_, k) => short(weight(n > 1 ? k / (n - 1) : 0.5))).join(", ")}]`;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  svg.append(element);
  return element;
}

function draw() {
  const n = count(), top = ceiling(), focused = [...svg.querySelectorAll(".handle")].indexOf(document.activeElement);
  svg.replaceChildren();
  for (const y of [0, top / 2, top]) {
    drawn("line", { class: "rule", x1: LEFT, x2: RIGHT, y1: py(y), y2: py(y) });
    drawn("text", { x: LEFT - 6, y: py(y) + 3, "text-anchor": "end" }, short(y));
  }
  drawn("text", { x: LEFT, y: 146 }, "noise");
  drawn("text", { x: RIGHT, y: 146, "text-anchor": "end" }, "picture");
  const corners = stairs
    ? handles().flatMap(({ x, y }, i) => [[px(x), py(y)], [px(points[i + 1].x), py(y)]])
    : points.map(({ x, y }) => [px(x), py(y)]);
  const path = corners.map((corner) => corner.join(",")).join(" ");
  drawn("polygon", { class: "area", points: `${LEFT},${BOTTOM} ${path} ${RIGHT},${BOTTOM}` });
  drawn("polyline", { class: "line", points: path });
  for (let k = 0; n <= 100 && k < n; k++) {
    const x = stairs ? k / n : n > 1 ? k / (n - 1) : 0.5;
    drawn("circle", { class: "dot", cx: px(x), cy: py(weight(x)), r: 2 });
  }
  handles().forEach((point, i) => {
    const circle = drawn("circle", {
      class: "handle", cx: px(point.x), cy: py(point.y), r: 6, tabindex: 0, role: "slider", "aria-label": `point ${i + 1}`,
      "aria-valuenow": short(point.y), "aria-valuemin": 0, "aria-valuemax": 30, "aria-valuetext": `${short(point.y)} at ${short(point.x)}`,
    });
    circle.addEventListener("keydown", (event) => moved(event, point));
    if (i === focused) circle.focus();
  });
}

/** After a change of the points: the text follows. */
function changed(name = "") {
  named = name;
  svg.classList.remove("typed");
  plan.value = written();
  draw();
}

function move(point, x, y) {
  const i = points.indexOf(point), end = i === 0 || i === points.length - 1;
  if (!end) point.x = +Math.min(Math.max(x, points[i - 1].x + 0.01), points[i + 1].x - 0.01).toFixed(2);
  point.y = Math.min(Math.max(Math.round(y * 4) / 4, 0), 30);
}

function remove(point) {
  const i = points.indexOf(point);
  if (i > 0 && i < points.length - 1) points.splice(i, 1);
  changed();
}

function moved(event, point) {
  const by = { ArrowUp: [0, 0.25], ArrowDown: [0, -0.25], ArrowLeft: [-0.01, 0], ArrowRight: [0.01, 0] }[event.key];
  if (event.key === "Delete" || event.key === "Backspace") remove(point);
  else if (by) { move(point, point.x + by[0], point.y + by[1]); changed(); }
  else return;
  event.preventDefault();
}

/** Where the pointer is, as x in 0..1 and a weight. */
function place(event) {
  const box = svg.getBoundingClientRect(), scale = 480 / box.width;
  const x = ((event.clientX - box.left) * scale - LEFT) / (RIGHT - LEFT);
  return [Math.min(Math.max(x, 0), 1), ((BOTTOM - (event.clientY - box.top) * scale) / (BOTTOM - TOP)) * ceiling()];
}

svg.addEventListener("pointerdown", (event) => {
  const [x, y] = place(event);
  held = handles().find((point) => Math.hypot(px(point.x) - px(x), py(point.y) - py(y)) < 11);
  if (!held) {
    held = { x: +x.toFixed(2), y: 0 };
    const next = points.findIndex((point) => point.x > held.x);
    if (next < 1 || held.x === points[next - 1].x) { held = null; return; }
    points.splice(next, 0, held);
    move(held, x, y);
  }
  svg.setPointerCapture(event.pointerId);
  changed();
});
svg.addEventListener("pointermove", (event) => { if (held) { move(held, ...place(event)); changed(); } });
for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, () => { held = null; });
svg.addEventListener("dblclick", (event) => {
  const [x, y] = place(event);
  const point = handles().find((other) => Math.hypot(px(other.x) - px(x), py(other.y) - py(y)) < 11);
  if (point) remove(point);
});
plan.addEventListener("input", () => svg.classList.add("typed"));
steps.addEventListener("input", () => (svg.classList.contains("typed") ? draw() : changed(named)));
for (const radio of document.querySelectorAll("input[name=shape]")) {
  radio.addEventListener("change", () => { stairs = radio.value === "stairs" && radio.checked; changed(); });
}

function shape(name) {
  stairs = name === "stairs";
  document.querySelector(`input[name=shape][value=${name}]`).checked = true;
}

for (const button of document.querySelectorAll("[data-curve]")) {
  button.addEventListener("click", () => {
    const top = Math.max(1, ...handles().map(({ y }) => y)), kind = button.dataset.curve;
    shape(kind === "interval" ? "stairs" : "lines");
    if (kind === "constant") points = [{ x: 0, y: top }, { x: 1, y: top }];
    if (kind === "ramp") points = [{ x: 0, y: 1 }, { x: 1, y: top }];
    if (kind === "cosine") {
      points = Array.from({ length: 9 }, (_, i) => ({ x: i / 8, y: +((top / 2) * (1 - Math.cos((Math.PI * i) / 8))).toFixed(2) }));
    }
    if (kind === "interval") points = [{ x: 0, y: 1 }, { x: 0.2, y: top }, { x: 0.7, y: 1 }, { x: 1, y: 1 }];
    changed(kind === "cosine" ? `cosine(${short(top / 2)})` : "");
  });
}

changed();
