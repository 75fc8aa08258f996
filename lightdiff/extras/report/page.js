// The rest of the page: what the reader chooses for charts, pictures in large, sliders, tables to sort, news of a live run.

let data = {};

function begin() {
  data = JSON.parse(document.getElementById("data").textContent);
  data.charts.forEach((chart) => {
    draw(chart);
    const home = document.getElementById(chart.id);
    home.querySelector(".log").addEventListener("click", () => {
      view.log[chart.id] = !chart.shown.log;
      draw(chart);
    });
    home.querySelector(".large").addEventListener("click", () => {
      home.classList.toggle("wide");
      draw(chart);
    });
  });
  document.querySelectorAll(".choices").forEach((home) => {
    const smoothing = home.querySelector("[name=smoothing]"), axis = home.querySelector("[name=axis]");
    smoothing.addEventListener("input", () => choose({ smoothing: Number(smoothing.value) }));
    axis.addEventListener("change", () => choose({ time: axis.value === "time" }));
  });
  choose({});
  data.sliders.forEach(slide);
  document.querySelectorAll("table.sortable").forEach(sortable);
}

function redraw() {
  data.charts.forEach(draw);
}

function choose(changes) {
  Object.assign(view, changes, "time" in changes ? { at: {} } : {});
  document.querySelectorAll(".choices").forEach((home) => {
    home.querySelector("[name=smoothing]").value = view.smoothing;
    home.querySelector("[name=axis]").value = view.time ? "time" : "step";
  });
  redraw();
}

function slide(slider) {
  const home = document.getElementById(slider.id), input = home.querySelector("input");
  if (!input) return;
  const images = home.querySelectorAll("img"), where = home.querySelector("output");
  const show = () => {
    const labels = slider.columns.map((column, i) => {
      const frame = column.frames[column.at[Number(input.value)]];
      images[i].src = frame.src;
      images[i].alt = frame.alt;
      return frame.label;
    });
    const same = labels.every((label) => label === labels[0]);
    where.textContent = same ? labels[0] : labels.map((label, i) => `${slider.columns[i].name}: ${label}`).join("; ");
    input.setAttribute("aria-valuetext", where.textContent);
  };
  input.addEventListener("input", show);
  show();
}

// Sort the rows by a column when its heading is pressed, and the other way round when it is pressed again.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => {
    const text = row.cells[column].dataset.key;
    return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [keyOf(one, column), keyOf(other, column)];
      if (a === null || b === null) return (a === null) - (b === null);  // what is not known comes last
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// --- pictures in large ---

const large = document.getElementById("large");
document.addEventListener("click", (event) => {
  const picture = event.target.closest(".picture");
  if (!picture) return;
  const from = picture.querySelector("img"), to = large.querySelector("img");
  to.src = from.src;
  to.alt = from.alt;
  large.querySelector("p").textContent = from.alt;
  const room = Math.floor((window.innerWidth - 32) / from.naturalWidth);
  to.style.width = `${from.naturalWidth * Math.max(1, Math.min(4, room))}px`;
  large.showModal();
});
large.addEventListener("click", () => large.close());

// --- a live page ---

async function refresh() {
  let wait = 2, said;
  try {
    const news = await ask("state").then((answer) => answer.json());
    wait = news.wait;
    const busy = document.querySelector("main :active");  // a slider or a button is being held
    if (news.state !== data.live && !busy) renew(await ask("./").then((answer) => answer.text()));
    said = `live: as of ${new Date().toLocaleTimeString()}`;
  } catch {
    said = "not live just now: lightdiff report --live has ended, or cannot be reached";
  }
  document.getElementById("news").textContent = said;
  setTimeout(refresh, 1000 * wait);
}

async function ask(what) {
  const answer = await fetch(what, { cache: "no-store" });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

// Take over a new page's contents; what the reader has opened or moved stays as it is.
function renew(text) {
  const page = new DOMParser().parseFromString(text, "text/html");
  const opened = [...document.querySelectorAll("details")].map((one) => one.open);
  const wide = [...document.querySelectorAll(".chart.wide")].map((one) => one.id);
  const moved = [...document.querySelectorAll(".slider input")].filter((one) => one.value !== one.max);
  const places = moved.map((one) => [one.closest(".slider").id, one.value]);
  document.querySelector("main").replaceWith(page.querySelector("main"));
  document.getElementById("data").textContent = page.getElementById("data").textContent;
  document.title = page.title;
  document.querySelectorAll("details").forEach((one, i) => (one.open = opened[i] ?? false));
  wide.forEach((id) => document.getElementById(id)?.classList.add("wide"));
  places.forEach(([id, value]) => {
    const input = document.querySelector(`#${id} input`);
    if (input) input.value = value;
  });
  begin();
}

begin();
let drawn = window.innerWidth;
window.addEventListener("resize", () => {
  if (drawn !== window.innerWidth) redraw();  // a phone's bars come and go while it scrolls
  drawn = window.innerWidth;
});
if (data.live) refresh();
