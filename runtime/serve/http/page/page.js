// Demo page of `stepforge serve`: one form, one stream of events. Texts from the server reach the page as text, never as HTML.

import "./curve.js";
import { sizePad } from "./pad.js";

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
  proportions();
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

function proportions() { sizePad(+width.value, +height.value); }
function toggleControl() { $("control").hidden = !$("control-on").checked; }
$("control-on").addEventListener("change", toggleControl);
for (const input of [width, height]) input.addEventListener("change", proportions);
$("pad").addEventListener("opened", () => { // a picture is no hint yet: a network named for its preprocessor gets that
  const name = $("control-name").value;
  if ([...$("preprocessor").options].some(({ value }) => value === name)) $("preprocessor").value = name;
});
$("pad").addEventListener("fault", (event) => show(new Error(event.detail)));

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
    size: `${width.value}x${height.value}`, guidance: $("guidance").value, stream: true, partial_images: 3, progress: true,
    output_format: "png",
  };
  if (Object.keys(adapters).length) asked.adapters = adapters;
  if ($("upscale").value) asked.upscale = [{ name: $("upscale").value }];
  if ($("control-on").checked) {
    asked.controls = [{
      name: $("control-name").value, image: $("pad").toDataURL("image/png"), preprocessor: $("preprocessor").value,
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
$("login").addEventListener("submit", (event) => event.preventDefault()); // its input has changed already

connect();
