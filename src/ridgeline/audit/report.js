// Hovering, touching or pressing the arrow keys on a chart moves its crosshair and shows the
// values of the nearest logged step in the legend. Without this script the last values stand there.
"use strict";
const SVG = "http://www.w3.org/2000/svg";

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const { end, series } = JSON.parse(figure.dataset.chart);
  const canvas = figure.querySelector(".canvas");
  const probe = canvas.querySelector(".probe");
  const [stepOutput, ...outputs] = figure.querySelectorAll(".legend output");
  const atRest = [stepOutput, ...outputs].map((output) => output.textContent);
  const main = series.find((one) => one.x.length > 0);
  if (!main) continue;
  const texts = series.map((one) => one.text.split("|"));
  const dots = series.map((one) => {
    const dot = document.createElementNS(SVG, "circle");
    dot.setAttribute("class", `points tone${one.tone}`);
    dot.setAttribute("r", "4");
    return probe.appendChild(dot);
  });
  let current = main.x.length - 1;

  function show(index) {
    current = Math.max(0, Math.min(main.x.length - 1, index));
    const step = main.x[current];
    stepOutput.textContent = step.toLocaleString("en-US");
    const line = probe.querySelector("line");
    for (const side of ["x1", "x2"]) line.setAttribute(side, `${(100 * step) / end}%`);
    series.forEach((one, k) => {
      if (one.x.length === 0) return;
      const i = nearest(one.x, step);
      const elsewhere = one.x[i] === step ? "" : ` at ${one.x[i].toLocaleString("en-US")}`;
      outputs[k].textContent = texts[k][i] + elsewhere;
      dots[k].setAttribute("cx", `${(100 * one.x[i]) / end}%`);
      dots[k].setAttribute("cy", `${one.y[i] / 10}%`);
    });
    figure.classList.add("probing");
  }

  function rest() {
    figure.classList.remove("probing");
    [stepOutput, ...outputs].forEach((output, k) => { output.textContent = atRest[k]; });
  }

  canvas.addEventListener("pointermove", (event) => {
    const bounds = canvas.getBoundingClientRect();
    show(nearest(main.x, (end * (event.clientX - bounds.left)) / bounds.width));
  });
  canvas.addEventListener("pointerleave", rest);
  canvas.addEventListener("blur", rest);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
    if (!(event.key in moves)) return;
    show(current + moves[event.key]);
    event.preventDefault();
  });
}
