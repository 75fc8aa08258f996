// The page: controls, networks, canvases.

import { noise, sample, slerp, SAMPLERS } from "./draw.js";

const $ = (name) => document.getElementById(name);
const model = await (await fetch("model.json")).json();
const { channels, height, width, shift, scale } = model.latent;
const count = channels * height * width;
const runtime = new URL(model.runtime, location.href).href;
let ort, unet, guide, decoder, shown = [], busy = false;

// --- networks -------------------------------------------------------------------------------------------------------

/** The networks: on the GPU where the browser has WebGPU, else in WebAssembly. */
async function load() {
  const wanted = new URLSearchParams(location.search).get("on");
  const gpu = "gpu" in navigator && "Suspending" in WebAssembly && (await navigator.gpu.requestAdapter().catch(() => null));
  for (const on of (wanted ? [wanted] : gpu ? ["webgpu", "wasm"] : ["wasm"])) {
    try {
      ort = await import(`${runtime}${on === "webgpu" ? "ort.jspi.min.mjs" : "ort.wasm.min.mjs"}`);
      ort.env.wasm.wasmPaths = runtime;
      ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
      const open = (file) => ort.InferenceSession.create(file, { executionProviders: [on] });
      unet = await open("unet.onnx");
      if (model.guide) guide = await open("guide.onnx");
      decoder = await open("vae_decoder.onnx");
      return on;
    } catch (error) {
      if (on === "wasm" || wanted) throw error;
      console.warn(`${on} does not work here: ${error}`);
    }
  }
}

async function predict(latents, t, labels, worse = false) {
  const batch = latents.length, x = new Float32Array(batch * count);
  latents.forEach((one, i) => x.set(one, i * count));
  const feeds = {
    x: new ort.Tensor("float32", x, [batch, channels, height, width]),
    t: new ort.Tensor("float32", new Float32Array(batch).fill(t), [batch]),
  };
  if (model.classes.length) {
    const known = labels ?? latents.map(() => model.classes.length);
    feeds.label = new ort.Tensor("int64", BigInt64Array.from(known.map(BigInt)), [batch]);
  }
  const { prediction } = await (worse ? guide : unet).run(feeds);
  return latents.map((_, i) => prediction.data.slice(i * count, (i + 1) * count));
}

/** A clean latent of diffusion, or a noisy one, as an image. */
async function decode(x0) {
  const z = x0.map((value, i) => {
    const c = Math.floor(i / (height * width));
    return value / scale[c % scale.length] + shift[c % shift.length];
  });
  const { image } = await decoder.run({ z: new ort.Tensor("float32", z, [1, channels, height, width]) });
  const [, , h, w] = image.dims, pixels = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round((image.data[c * h * w + i] + 1) * 127.5); // clamped
    pixels.data[4 * i + 3] = 255;
  }
  return pixels;
}

function paint(canvas, pixels) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// --- drawing --------------------------------------------------------------------------------------------------------

function chosen() {
  const class_ = $("class").value;
  return {
    seed: $("seed").value.trim(),
    label: class_ === "" ? null : Number(class_),
    guidance: Number($("guidance").value),
    steps: Number($("steps").value),
    sampler: $("sampler").value,
    spacing: $("spacing").value,
  };
}

/** Draw one image from its noise, and remember every step. */
async function draw(how, start, tell) {
  const steps = [], began = performance.now(), way = sample(model, predict, how, start);
  for (;;) {
    const { value, done } = await way.next();
    if (done) return { steps, x0: value, pixels: await decode(value), time: (performance.now() - began) / how.steps };
    steps.push(value);
    tell(steps.length);
    await new Promise((later) => setTimeout(later)); // let the page be painted
  }
}

/** Do one thing at a time, and say how it ended. */
async function run(work) {
  if (busy) return;
  busy = true;
  document.body.dataset.state = "drawing";
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  try {
    await work();
    document.body.dataset.state = "done";
  } catch (error) {
    $("status").textContent = error.message ?? String(error);
    document.body.dataset.state = "failed";
  }
  for (const button of document.querySelectorAll("button")) button.disabled = false;
  busy = false;
}

async function drawOne() {
  const how = chosen(), tell = (step) => ($("status").textContent = `step ${step} of ${how.steps}`);
  const made = await draw(how, noise(count, how.seed, "start", 0), tell);
  paint($("picture"), made.pixels);
  shown = made.steps;
  $("step").max = shown.length - 1;
  $("step").value = shown.length - 1;
  await showStep();
  $("status").textContent = `seed ${how.seed}: ${made.time.toFixed(0)} ms a step, on ${document.body.dataset.on}`;
}

async function showStep() {
  const number = Number($("step").value), step = shown[number];
  if (!step) return;
  step.pictures ??= [await decode(step.x), await decode(step.x0)];
  paint($("noisy"), step.pictures[0]);
  paint($("clean"), step.pictures[1]);
  const { t, alpha, sigma } = step.level;
  $("level").textContent = `step ${number + 1}: t = ${t.toFixed(0)}, alpha = ${alpha.toFixed(3)}, sigma = ${sigma.toFixed(3)}`;
}

async function walk() {
  const how = chosen(), frames = Number($("frames").value), list = $("walk");
  const ends = [how.seed, $("to").value.trim()].map((seed) => noise(count, seed, "start", 0));
  list.replaceChildren();
  for (let i = 0; i < frames; i++) {
    const share = frames > 1 ? i / (frames - 1) : 0;
    const start = i === 0 ? ends[0] : i === frames - 1 ? ends[1] : slerp(...ends, share);
    const tell = (step) => ($("status").textContent = `picture ${i + 1} of ${frames}, step ${step} of ${how.steps}`);
    const canvas = document.createElement("canvas");
    paint(canvas, (await draw(how, start, tell)).pixels);
    list.append(canvas);
  }
  $("status").textContent = `from seed ${how.seed} to seed ${$("to").value.trim()}`;
}

// --- the page itself ------------------------------------------------------------------------------------------------

function options(select, rows) {
  select.replaceChildren(...rows.map(([text, value]) => new Option(text, value)));
}

$("title").textContent = document.title = model.title;
$("about").textContent = model.about;
options($("class"), [["any", ""], ...model.classes.map((name, i) => [name, i])]);
options($("sampler"), Object.keys(SAMPLERS).map((name) => [name, name]));
options($("spacing"), ["trailing", "uniform", "karras", "quadratic"].map((name) => [name, name]));
for (const row of document.querySelectorAll(".classes")) row.hidden = !model.classes.length;
$("guided").hidden = !model.classes.length && !model.guide;
$("steps").max = model.alpha.length;
$("draw").onclick = () => run(drawOne);
$("walking").onclick = () => run(walk);
let sliding = Promise.resolve();
$("step").oninput = () => (sliding = sliding.then(() => (busy ? null : showStep())));
await run(async () => {
  $("status").textContent = "loading the model";
  document.body.dataset.on = await load();
  await drawOne();
});
