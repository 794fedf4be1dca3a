"use strict";
// Light, dark, or as the system says. The choice is kept where the browser lets a page keep anything.
(() => {
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let chosen = "system";
  const storage = (() => { try { return window.localStorage; } catch { return null; } })();
  const show = (theme) => {
    chosen = themes.includes(theme) ? theme : "system";
    if (chosen === "system") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  show(storage?.getItem("theme") ?? "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    show(themes[(themes.indexOf(chosen) + 1) % themes.length]);
    storage?.setItem("theme", chosen);
  });
})();
// The values under the pointer: of every series of a chart the point that is nearest, from the chart's own table.
(() => {
  const toNumber = (words) => parseFloat(words.replaceAll(",", ""));
  const readSeries = (figure) => {
    const found = new Map();
    for (const row of figure.querySelectorAll("details tbody tr")) {
      const [name, x, y] = Array.from(row.cells, (cell) => cell.textContent);
      if (y === "") continue;
      if (!found.has(name)) found.set(name, []);
      found.get(name).push({ at: toNumber(x), x, y });
    }
    return found;
  };
  for (const svg of document.querySelectorAll("svg.chart[data-scale]")) {
    const figure = svg.closest("figure");
    const [left, right, low, high, top, bottom] = svg.dataset.scale.split(" ").map(Number);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const box = document.createElement("div");
    box.className = "values";
    box.setAttribute("aria-hidden", "true"); // the table below has the same numbers
    let series = null;
    const hide = () => { line.remove(); box.remove(); };
    const show = (event) => {
      series ??= readSeries(figure);
      const frame = svg.getBoundingClientRect();
      const unit = svg.viewBox.baseVal.width / frame.width;
      const share = ((event.clientX - frame.left) * unit - left) / (right - left);
      if (share < -0.02 || share > 1.02) { hide(); return; }
      const at = low + share * (high - low);
      const nearest = [...series].map(([name, points]) => [name, points.reduce((best, point) => (
        Math.abs(point.at - at) < Math.abs(best.at - at) ? point : best))]);
      if (!nearest.length) return;
      const shown = nearest.reduce((best, [, point]) => (Math.abs(point.at - at) < Math.abs(best.at - at) ? point : best), nearest[0][1]);
      const place = left + (shown.at - low) / (high - low) * (right - left);
      for (const [name, value] of Object.entries({ x1: place, x2: place, y1: top, y2: bottom, class: "mark" })) line.setAttribute(name, value);
      svg.append(line);
      const label = svg.querySelector("text.axis").textContent;
      box.textContent = [`${label} ${shown.x}`, ...nearest.map(([name, point]) => (
        `${name}: ${point.y}${point.x === shown.x ? "" : ` (at ${point.x})`}`))].join("\n");
      figure.append(box);
      const inside = figure.getBoundingClientRect();
      const isLeft = event.clientX > inside.left + inside.width / 2;
      box.style.top = `${frame.top - inside.top + 8}px`;
      box.style.left = isLeft ? "auto" : `${event.clientX - inside.left + 14}px`;
      box.style.right = isLeft ? `${inside.right - event.clientX + 14}px` : "auto";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
})();
