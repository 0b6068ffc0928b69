// Sketch pad for ControlNets: white on black, or a picture of the user's own.

const $ = (id) => document.getElementById(id);
const pad = $("pad");
const ink = pad.getContext("2d", { willReadFrequently: true });
let past = [], stroke = null;

function wipe() {
  ink.fillStyle = "#000";
  ink.fillRect(0, 0, pad.width, pad.height);
}

/** Proportions of the picture; what was drawn is stretched with them. */
export function sizePad(width, height) {
  const tall = Math.round(Math.min(Math.max(256 * ((height || 1) / (width || 1)), 64), 1024));
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
    const by = Math.max(pad.width / image.width, pad.height / image.height); // no bars, which a preprocessor would see
    const [w, h] = [image.width * by, image.height * by];
    keep();
    wipe();
    ink.drawImage(image, (pad.width - w) / 2, (pad.height - h) / 2, w, h);
    pad.dispatchEvent(new Event("opened"));
  } catch {
    pad.dispatchEvent(new CustomEvent("fault", { detail: `${file.name} cannot be read as a picture` }));
  }
});

wipe();
