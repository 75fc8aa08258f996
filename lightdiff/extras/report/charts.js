"use strict";
// Charts: an SVG each, drawn from the numbers in the page. Pointing at one marks the same place in all of its group.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 3", "8 3 2 3"];
const MARGIN = { left: 52, right: 12, top: 8, bottom: 24 };
const view = { smoothing: 0, time: false, log: {}, at: {} };  // what the reader has chosen; `at`: where a group is pointed at

function svg(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

// Exponential moving average, unbiased at its start (as in Adam: Kingma and Ba 2014, section 3).
function smoothed(values, weight) {
  let sum = 0, known = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    known = weight * known + (1 - weight);
    return sum / known;
  });
}

function ticks(low, high, log, most = 6) {
  if (log && high / low > 8) {
    const decades = Math.log10(high / low), digits = decades < 2 ? [1, 2, 5] : [1], found = [];
    const every = Math.ceil(decades / most);
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every)
      found.push(...digits.map((digit) => digit * 10 ** power));
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first;
  return Array.from({ length: count + 1 }, (_, i) => (first + i) * step);
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function colourOf(number) {
  return number < 0 ? "var(--ink)" : `var(--colour-${number % 6})`;
}

// What is drawn: x in steps, minutes or hours, y smoothed; and the ranges of both.
function prepare(chart) {
  const minutes = view.time && chart.series.every((s) => s.minutes.length === s.x.length);
  const longest = minutes ? Math.max(...chart.series.map((s) => s.minutes[s.minutes.length - 1])) : 0;
  const hours = longest > 180;
  const smooth = chart.x === "step" && view.smoothing > 0;
  const series = chart.series.map((s) => ({
    ...s,
    at: minutes ? s.minutes.map((m) => (hours ? m / 60 : m)) : s.x,
    raw: s.y,
    y: smooth && s.y.length > 9 ? smoothed(s.y, view.smoothing) : s.y,  // validations are few
  }));
  const log = view.log[chart.id] ?? chart.log;
  const usable = (y) => y !== null && (!log || y > 0);
  const ys = [...series.flatMap((s) => s.y), ...chart.baselines.map((b) => b.y)].filter(usable);
  const xs = series.flatMap((s) => s.at);
  let [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [log ? 1 : 0, log ? 10 : 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const room = log ? (high / low) ** 0.04 : (high - low) * 0.04;
  const left = Math.min(...xs), right = Math.max(...xs);
  return {
    series, log, usable, name: chart.x !== "step" ? chart.x : minutes ? (hours ? "hours" : "minutes") : "optimizer step",
    y: log ? [low / room, high * room] : [low - room, high + room], x: [left, right > left ? right : left + 1],
  };
}

function draw(chart) {
  const home = document.getElementById(chart.id), plot = home.querySelector(".plot");
  const width = plot.clientWidth, height = plot.clientHeight;
  const shown = prepare(chart), [left, right] = shown.x, [low, high] = shown.y;
  const scaled = (value) => (shown.log ? Math.log(value) : value);
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const px = (x) => MARGIN.left + ((x - left) / (right - left)) * inner.width;
  const py = (y) => MARGIN.top + (1 - (scaled(y) - scaled(low)) / (scaled(high) - scaled(low))) * inner.height;
  const root = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ width, height, role: "img", tabindex: 0, "aria-label": home.dataset.words })) root.setAttribute(key, value);
  const clip = svg("clipPath", { id: `${chart.id}-clip` }, root);
  svg("rect", { x: MARGIN.left, y: MARGIN.top, width: Math.max(0, inner.width), height: Math.max(0, inner.height) }, clip);
  for (const y of ticks(low, high, shown.log, 5)) {
    svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(y), y2: py(y) }, root);
    svg("text", { x: MARGIN.left - 6, y: py(y) + 4, "text-anchor": "end" }, root).textContent = short(y);
  }
  for (const x of ticks(left, right, false, width < 420 ? 4 : 7)) {
    const anchor = px(x) > width - 40 ? "end" : "middle";
    svg("text", { x: px(x), y: height - 6, "text-anchor": anchor }, root).textContent = short(x);
  }
  const lines = svg("g", { "clip-path": `url(#${chart.id}-clip)` }, root);
  const path = (xs, ys) => {
    let text = "", pen = "M";
    ys.forEach((y, i) => {
      if (shown.usable(y)) text += `${pen}${px(xs[i]).toFixed(1)},${py(y).toFixed(1)}`;
      pen = shown.usable(y) ? "L" : "M";
    });
    return text;
  };
  for (const b of chart.baselines) {
    svg("line", { class: "baseline", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(b.y), y2: py(b.y), style: `stroke: ${colourOf(b.colour)}` }, lines);
  }
  for (const s of shown.series) {
    const style = `stroke: ${colourOf(s.colour)}; stroke-dasharray: ${DASHES[s.dash % 4] || "none"}`;
    if (s.y !== s.raw) svg("path", { class: "raw", d: path(s.at, s.raw), style }, lines);
    svg("path", { class: "series", d: path(s.at, s.y), style }, lines);
    if (s.y.length < 30)
      s.y.forEach((y, i) => shown.usable(y) && svg("circle", { cx: px(s.at[i]), cy: py(y), r: 2.5, style: `fill: ${colourOf(s.colour)}` }, lines));
  }
  chart.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" }, root);
  Object.assign(chart, { shown, px });
  const point = (x) => {
    view.at[chart.group] = x === null ? null : Math.min(right, Math.max(left, x));
    data.charts.filter((other) => other.group === chart.group && other.shown).forEach(mark);
  };
  const place = (event) => left + ((event.clientX - root.getBoundingClientRect().left - MARGIN.left) / inner.width) * (right - left);
  root.addEventListener("pointermove", (event) => point(place(event)));
  root.addEventListener("pointerdown", (event) => point(place(event)));
  root.addEventListener("pointerleave", () => point(null));
  root.addEventListener("blur", () => point(null));
  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) point((view.at[chart.group] ?? right) + (by * (right - left)) / 50);
  });
  plot.replaceChildren(root);
  home.querySelector(".axis").textContent = shown.name;
  home.querySelector(".log").setAttribute("aria-pressed", shown.log);
  mark(chart);
}

// The values at the place that is pointed at, or the last ones.
function mark(chart) {
  const at = view.at[chart.group] ?? null, [left, right] = chart.shown.x;
  chart.cursor.setAttribute("visibility", at === null || at < left || at > right ? "hidden" : "visible");
  if (at !== null) for (const end of ["x1", "x2"]) chart.cursor.setAttribute(end, chart.px(at));
  const items = chart.shown.series.map((s) => {
    let last = s.y.length - 1;
    if (at !== null) while (last > 0 && s.at[last] > at) last -= 1;
    const known = at !== null || chart.x === "step";  // the last value of a histogram says nothing
    return [s.name, known ? s.y[last] : "", colourOf(s.colour), DASHES[s.dash % 4]];
  });
  const known = chart.baselines.map((b) => short(b.y)).join(", ");
  if (known) items.push(["from the noise level alone", known, colourOf(chart.baselines.length > 1 ? -1 : chart.baselines[0].colour), "1 4"]);
  const legend = document.querySelector(`#${chart.id} .legend`);
  legend.replaceChildren(...items.map(([name, value, colour, dash]) => {
    const item = document.createElement("li"), sample = svg("svg", { width: 22, height: 8, "aria-hidden": true }, item);
    svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, style: `stroke: ${colour}; stroke-width: 2; stroke-dasharray: ${dash || "none"}` }, sample);
    const number = document.createElement("b");
    number.textContent = typeof value === "string" ? value : short(value);
    item.append(` ${name} `, number);
    return item;
  }));
  const where = document.querySelector(`#${chart.id} .where`);
  where.textContent = at === null ? "" : `at ${short(chart.x === "step" && chart.shown.name === "optimizer step" ? Math.round(at) : at)}`;
}
