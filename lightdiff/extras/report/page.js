"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dashes = ["solid", "dash", "dot", "dashdot"];
const coarse = window.matchMedia("(pointer: coarse)").matches;  // a finger scrolls; the buttons zoom
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function draw(chart) {
  const ink = style("--ink"), line = style("--line"), colours = style("--colours").split(",").map((c) => c.trim());
  const traces = chart.series.map((s) => ({
    name: s.name, x: s.x, y: s.y, type: "scatter", mode: s.marks ? "lines+markers" : "lines",
    line: { color: s.colour < 0 ? ink : colours[s.colour % colours.length], dash: dashes[s.dash % dashes.length], width: 2 },
  }));
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
    margin: { l: 48, r: 8, t: 30, b: 40 }, hovermode: "x unified", showlegend: traces.length > 1,
    hoverlabel: { bgcolor: style("--paper"), font: { color: ink } }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" }, modebar: { color: ink, activecolor: ink, bgcolor: "rgba(0,0,0,0)" },
    dragmode: coarse ? false : "zoom",
    xaxis: { ...axis, title: { text: chart.x } }, yaxis: { ...axis, ...(chart.log ? { type: "log", tickformat: "~g", nticks: 3 } : { exponentformat: "power" }) },
  };
  Plotly.react(chart.id, traces, layout, {
    responsive: true, displaylogo: false, displayModeBar: true, modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });
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

const redraw = () => data.charts.forEach(draw);
redraw();
dark.addEventListener("change", redraw);
data.sliders.forEach(slide);
