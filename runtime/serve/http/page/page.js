// Demo page of `stepforge serve`: one form, one stream of events. Texts from the server reach the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const key = $("key"), model = $("model"), steps = $("steps"), width = $("width"), height = $("height");
let models = [];

// Requests

function headers() {
  const value = key.value.trim();
  return value ? { Authorization: `Bearer ${value}` } : {};
}

/** Message of OpenAI's error envelope, or what HTTP says. */
async function failure(response) {
  let text = `${response.status} ${response.statusText}`;
  try {
    const { error } = await response.json();
    if (error?.message) text = error.param ? `${error.param}: ${error.message}` : error.message;
  } catch { /* not JSON: the status line is all there is */ }
  if (response.status === 401) key.focus();
  const wait = response.headers.get("Retry-After");
  return new Error(wait ? `${text} (try again in ${wait} s)` : text);
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** Data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end; (end = rest.search(/\r?\n\r?\n/)) >= 0;) {
      const data = rest.slice(0, end).split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      rest = rest.slice(end).replace(/^\r?\n\r?\n/, "");
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

// What the server has

function options(select, values) {
  const kept = select.value;
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
  if (values.some(([value]) => value === kept)) select.value = kept;
}

async function connect() {
  try {
    models = (await get("v1/models")).data;
    options(model, models.map(({ id }) => [id, id]));
    await chosen();
    $("status").textContent = `${models.length} model${models.length === 1 ? "" : "s"}`;
    show(null);
  } catch (error) {
    $("status").textContent = "not connected";
    show(error);
  }
}

async function chosen() {
  const card = models.find(({ id }) => id === model.value)?.stepforge ?? {};
  const multiple = card.size_multiple ?? 8;
  for (const [input, size] of [[width, card.width], [height, card.height]]) {
    input.step = input.min = multiple;
    if (size) input.value = size;
  }
  const stages = card.upscalers ?? [], nets = card.controls ?? [];
  options($("upscale"), [["", "off"], ...stages.map((name) => [name, name])]);
  $("upscale-part").hidden = !stages.length;
  options($("control-name"), nets.map((name) => [name, name]));
  $("control-part").hidden = !nets.length;
  if (nets.includes("silhouette")) $("control-name").value = "silhouette";
  if (!nets.length) $("control-on").checked = false;
  toggleControl();
  sizePad();
  sliders((await get(`v1/adapters?model=${encodeURIComponent(model.value)}`)).data);
}

function sliders(adapters) {
  $("adapters-part").hidden = !adapters.length;
  $("adapters").replaceChildren(...adapters.map(({ id }) => {
    const row = document.createElement("label"), name = document.createElement("span"), output = document.createElement("output");
    const input = Object.assign(document.createElement("input"), { type: "range", min: -1, max: 2, step: 0.05, value: 0 });
    row.className = "adapter";
    name.textContent = name.title = input.dataset.adapter = id;
    output.textContent = "0";
    input.addEventListener("input", () => { output.textContent = input.value; });
    input.addEventListener("dblclick", () => { input.value = 0; output.textContent = "0"; });
    row.append(name, input, output);
    return row;
  }));
}

for (const input of document.querySelectorAll("#control input[type=range]")) {
  const output = document.querySelector(`output[for=${input.id}]`);
  const tell = () => { output.textContent = input.value; };
  input.addEventListener("input", tell);
  tell();
}
$("start").addEventListener("input", () => bound("end", Math.max($("end").value, +$("start").value + 0.05)));
$("end").addEventListener("input", () => bound("start", Math.min($("start").value, +$("end").value - 0.05)));

function bound(id, value) {
  $(id).value = value;
  document.querySelector(`output[for=${id}]`).textContent = $(id).value;
}

// Guidance: points over the steps, x in 0..1, y the weight. Lines give a number for each step, stairs give windows.

const svg = $("curve"), plan = $("guidance");
const LEFT = 26, RIGHT = 470, TOP = 10, BOTTOM = 128;
let points = [{ x: 0, y: 3 }, { x: 1, y: 3 }];
let stairs = false, held = null;

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
    const x = n > 1 ? k / (n - 1) : 0.5;
    drawn("circle", { class: "dot", cx: px(x), cy: py(weight(stairs ? k / n : x)), r: 2 });
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
function changed() {
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
steps.addEventListener("input", () => (svg.classList.contains("typed") ? draw() : changed()));
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
    changed();
  });
}

// Sketch pad: white on black

const pad = $("pad"), ink = pad.getContext("2d", { willReadFrequently: true });
let past = [], stroke = null;

function wipe() {
  ink.fillStyle = "#000";
  ink.fillRect(0, 0, pad.width, pad.height);
}

/** Proportions of the picture; what was drawn is stretched with them. */
function sizePad() {
  const tall = Math.round(Math.min(Math.max(256 * ((+height.value || 1) / (+width.value || 1)), 64), 1024));
  if (pad.height === tall) return;
  const kept = document.createElement("canvas");
  [kept.width, kept.height] = [pad.width, pad.height];
  kept.getContext("2d").drawImage(pad, 0, 0);
  pad.height = tall;
  ink.drawImage(kept, 0, 0, pad.width, pad.height);
  past = [];
}

function keep() {
  past.push(ink.getImageData(0, 0, pad.width, pad.height));
  if (past.length > 20) past.shift();
}

function spot(event) {
  const box = pad.getBoundingClientRect();
  return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
}

function paint() {
  ink.strokeStyle = ink.fillStyle = $("erase").checked ? "#000" : "#fff";
  ink.lineWidth = +$("brush").value;
  ink.lineCap = ink.lineJoin = "round";
  ink.stroke(stroke);
}

pad.addEventListener("pointerdown", (event) => {
  keep();
  const [x, y] = spot(event);
  stroke = new Path2D();
  stroke.moveTo(x, y);
  stroke.lineTo(x + 0.01, y);
  pad.setPointerCapture(event.pointerId);
  paint();
});
pad.addEventListener("pointermove", (event) => {
  if (!stroke) return;
  stroke.lineTo(...spot(event));
  paint();
});
for (const name of ["pointerup", "pointercancel"]) {
  pad.addEventListener(name, () => {
    if (stroke && $("fill").checked) ink.fill(stroke);
    stroke = null;
  });
}
$("clear").addEventListener("click", () => { keep(); wipe(); });
$("undo").addEventListener("click", () => { if (past.length) ink.putImageData(past.pop(), 0, 0); });
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    const image = await createImageBitmap(file);
    const by = Math.min(pad.width / image.width, pad.height / image.height);
    const [w, h] = [image.width * by, image.height * by];
    keep();
    wipe();
    ink.drawImage(image, (pad.width - w) / 2, (pad.height - h) / 2, w, h);
  } catch {
    show(new Error(`${file.name} cannot be read as a picture`));
  }
});

function toggleControl() { $("control").hidden = !$("control-on").checked; }
$("control-on").addEventListener("change", toggleControl);
for (const input of [width, height]) input.addEventListener("change", sizePad);

// Pictures

function show(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
}

function picture(image, partial) {
  const element = $("picture");
  element.src = image.url;
  element.alt = image.prompt;
  element.classList.toggle("partial", partial);
  element.onload = () => element.classList.toggle("small", element.naturalWidth <= 256);
  $("empty").hidden = true;
}

function finished(image) {
  picture(image, false);
  const link = Object.assign(document.createElement("a"), { href: image.url, download: `${image.seed}.png`, textContent: "save" });
  $("meta").replaceChildren(`seed ${image.seed} · ${image.seconds.toFixed(1)} s · ${image.prompt} · `, link);
}

function remember(image) {
  const button = Object.assign(document.createElement("button"), { type: "button", title: `${image.prompt}, seed ${image.seed}` });
  button.append(Object.assign(document.createElement("img"), { src: image.url, alt: image.prompt }));
  button.addEventListener("click", () => finished(image));
  $("history").prepend(button);
  while ($("history").children.length > 12) $("history").lastChild.remove();
}

function body() {
  const adapters = {};
  for (const input of document.querySelectorAll("[data-adapter]")) if (+input.value) adapters[input.dataset.adapter] = +input.value;
  const asked = {
    model: model.value, prompt: $("prompt").value, negative_prompt: $("negative").value, steps: +steps.value, seed: +$("seed").value,
    size: `${width.value}x${height.value}`, guidance: plan.value, stream: true, partial_images: 3, output_format: "png",
  };
  if (Object.keys(adapters).length) asked.adapters = adapters;
  if ($("upscale").value) asked.upscale = [{ name: $("upscale").value }];
  if ($("control-on").checked) {
    asked.controls = [{
      name: $("control-name").value, image: pad.toDataURL("image/png"), preprocessor: $("preprocessor").value,
      scale: +$("scale").value, start: +$("start").value, end: +$("end").value,
    }];
  }
  return asked;
}

let running = null;

async function generate() {
  const asked = body(), begun = performance.now(), bar = $("progress");
  running = new AbortController();
  show(null);
  bar.value = 0;
  $("go").disabled = true;
  $("stop").disabled = false;
  try {
    const response = await fetch("v1/images/generations", {
      method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(asked), signal: running.signal,
    });
    if (!response.ok) throw await failure(response);
    let done = false;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const more = event.stepforge ?? {};
      if (more.steps) bar.value = more.step / more.steps;
      if (!event.b64_json) continue;
      const image = {
        url: `data:image/${event.output_format ?? "png"};base64,${event.b64_json}`, prompt: asked.prompt, seed: more.seed ?? asked.seed,
        seconds: (performance.now() - begun) / 1000,
      };
      if (event.type === "image_generation.completed") {
        done = true;
        bar.value = 1;
        finished(image);
        remember(image);
      } else picture(image, true);
    }
    if (!done) throw new Error("the stream ended without a picture");
  } catch (error) {
    bar.value = 0;
    if (error.name === "AbortError") $("meta").textContent = "stopped";
    else show(error);
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").disabled = true;
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!running) generate(); });
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); });
model.addEventListener("change", () => chosen().catch(show));
key.addEventListener("change", connect);

wipe();
changed();
connect();
