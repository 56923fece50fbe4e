// Draws the figures with plotly.js, and again when one of their selects or the theme of the screen changes.
// What a choice does stands in the page's data (lab/src/report/figures.rs): tags, x values, paths into the layout.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--muted"), showline: true, ticks: "outside" };
  return Object.assign(structuredClone(layout), {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--text"), family: style.fontFamily, size: 13 },
    hoverlabel: { align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--text") },
    xaxis: Object.assign({}, layout.xaxis, axis),
    yaxis: Object.assign({}, layout.yaxis, axis),
  });
}

function draw(figure) {
  const chosen = figure.controls.map((control, i) =>
    control.options[document.getElementById(`${figure.id}-${i}`).selectedIndex]);
  const x = chosen.map(option => option.x).find(Boolean);
  const shown = figure.curves.filter(({ tags }) =>
    chosen.every(({ only }) => Object.entries(only).every(([tag, value]) => tags[tag] === value)));
  const named = new Set();
  const traces = shown.map(curve => {
    const group = curve.trace.legendgroup;
    const showlegend = curve.legend && !named.has(group);
    if (showlegend) named.add(group);
    return Object.assign({}, curve.trace, { showlegend }, curve.x ? { x: data.x[curve.x][x] } : {});
  });
  const layout = themed(figure.layout);
  for (const option of chosen) {
    for (const [path, value] of Object.entries(option.layout)) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((node, key) => node[key] = Object.assign({}, node[key]), layout)[last] = value;
    }
  }
  if (!shown.length) {
    layout.annotations = [{ text: "nothing was recorded for this choice", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }];
  }
  Plotly.react(figure.id, traces, layout, config);
}

const all = () => data.figures.forEach(draw);
for (const figure of data.figures) {
  figure.controls.forEach((_, i) =>
    document.getElementById(`${figure.id}-${i}`).addEventListener("change", () => draw(figure)));
}
dark.addEventListener("change", all);
// Paper is white, whatever the screen is.
addEventListener("beforeprint", () => { document.documentElement.classList.add("paper"); all(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("paper"); all(); });
all();
