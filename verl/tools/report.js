"use strict";
(() => {
  const { charts, colors, dashes, markers } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const HEIGHT = 210, TOP = 10, RIGHT = 14, BOTTOM = 24, FEW = 40;

  function element(name, attributes, parent, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  // Round values: 1, 2 or 5 times a power of ten.
  function ticks(low, high, count, whole) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = power * ([1, 2, 5].find((factor) => factor * power >= rough) || 10);
    if (whole) step = Math.max(1, step);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  function number(value) {
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
    return Number(value.toPrecision(Math.abs(value) >= 1000 ? 5 : 3)).toLocaleString("en");
  }

  const measure = (value, unit) => number(value) + (unit === "%" ? " %" : unit === "s" ? " s" : "");

  // The middle 96 %: one wild step must not flatten all the others.
  function middle(values) {
    const sorted = [...values].sort((a, b) => a - b);
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
    return sorted.length < 10 ? sorted : [at(0.02), at(0.98)];
  }

  class Chart {
    constructor(figure, data, hidden) {
      Object.assign(this, { figure, data, hidden, place: figure.querySelector(".plot") });
      this.steps = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      this.summary = data.lines.map((line) => {
        const name = this.swatch(line.key).parentNode.textContent.trim();
        const last = line.x.length - 1;
        return `${name}: ${measure(line.y[0], data.unit)} at step ${line.x[0]}, ${measure(line.y[last], data.unit)} at step ${line.x[last]}`;
      }).join("; ");
      this.draw();
    }

    swatch(key) {
      return this.figure.closest("section").querySelector(`[data-key="${key}"] svg`);
    }

    // Lines with what is drawn: for a stack, sums from the bottom up.
    visible() {
      const lines = this.data.lines.filter((line) => !this.hidden.has(line.key));
      if (!this.data.stack) return lines;
      let below = this.steps.map(() => 0);
      return lines.map((line) => {
        const lo = below;
        below = below.map((value, i) => value + line.y[i]);
        return { ...line, value: line.y, y: below, lo, hi: below };
      });
    }

    range(lines) {
      let values = lines.flatMap((line) => [...line.y, ...(line.lo || []), ...(line.hi || [])]);
      for (const line of lines) for (const raw of line.raw || []) values = values.concat(middle(raw[1]));
      let [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
      if (low > high) [low, high] = [0, 1];
      if (this.data.limit && this.data.limit < 1.5 * high) high = Math.max(high, this.data.limit);
      if (low >= 0 && low < 0.6 * high) low = 0;
      const room = (high - low || Math.abs(high) || 20) * 0.05;
      return [low === 0 ? 0 : low - room, high + room];
    }

    draw() {
      const { data, place } = this;
      const lines = this.lines = this.visible();
      const width = this.width = Math.max(place.clientWidth, 160);
      const [low, high] = this.range(lines);
      const yTicks = ticks(low, high, 5);
      const left = this.left = 14 + 6.6 * Math.max(...yTicks.map((tick) => number(tick).length));
      const ends = data.lines.flatMap((line) => [line.x, ...(line.raw || []).map((raw) => raw[0])]).flatMap((xs) => [xs[0], xs[xs.length - 1]]);
      const begin = Math.min(...ends), last = Math.max(...ends);
      const first = begin === 1 || begin < last / 20 ? 0 : begin;
      const x = this.x = (step) => first === last ? (left + width - RIGHT) / 2 : left + (step - first) / (last - first) * (width - left - RIGHT);
      const y = this.y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
      const points = (xs, ys) => xs.map((step, i) => `${x(step).toFixed(1)} ${y(ys[i]).toFixed(1)}`);
      const svg = element("svg", { width, height: HEIGHT, tabindex: 0, role: "img", "aria-label": `${data.title}. ${this.summary}. Arrow keys read values.` });
      for (const tick of yTicks) {
        element("line", { class: "tick", x1: left, x2: width - RIGHT, y1: y(tick), y2: y(tick) }, svg);
        element("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, number(tick));
      }
      for (const tick of ticks(first, last, width / 80, true)) {
        element("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, svg, number(tick));
      }
      const clip = `clip${charts.indexOf(data)}`;
      element("rect", { x: left - 5, width: width - left - RIGHT + 10, y: TOP - 5, height: HEIGHT - TOP - BOTTOM + 10 }, element("clipPath", { id: clip }, svg));
      const body = element("g", { "clip-path": `url(#${clip})` }, svg);
      if (data.limit <= high) {
        element("line", { class: "limit", x1: left, x2: width - RIGHT, y1: y(data.limit), y2: y(data.limit) }, body);
      }
      const palette = (line) => `c${line.key % colors}`;
      for (const line of lines) {
        const group = element("g", { class: palette(line) }, body);
        for (const [xs, ys] of line.raw || []) element("polyline", { class: "rawline", points: points(xs, ys) }, group);
        if (line.lo) {
          const back = points(line.x, line.lo).reverse();
          element("polygon", { class: data.stack ? "area" : "band", points: [...points(line.x, line.hi), ...back] }, group);
        }
      }
      for (const line of data.stack ? [] : lines) {
        const group = element("g", { class: palette(line) }, body);
        const weight = line.bold === undefined ? "" : line.bold ? " bold" : " thin";
        element("polyline", { class: `line${weight}`, points: points(line.x, line.y), "stroke-dasharray": dashes[line.key % dashes.length] }, group);
        const all = data.points && line.x.length <= FEW;
        for (const i of all ? line.x.keys() : [line.x.length - 1]) {
          element("path", { class: "dot", d: markers[line.key % markers.length], transform: `translate(${points([line.x[i]], [line.y[i]])})` }, group);
        }
      }
      this.cross = element("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
      svg.addEventListener("pointermove", (event) => this.point(event));
      svg.addEventListener("pointerdown", (event) => this.point(event));
      svg.addEventListener("pointerleave", () => this.leave());
      svg.addEventListener("blur", () => this.leave());
      svg.addEventListener("keydown", (event) => this.key(event));
      place.replaceChildren(svg);
    }

    point(event) {
      const at = event.clientX - this.place.getBoundingClientRect().left;
      const distance = (i) => Math.abs(this.x(this.steps[i]) - at);
      let nearest = 0;
      for (const i of this.steps.keys()) if (distance(i) < distance(nearest)) nearest = i;
      this.show(nearest);
    }

    key(event) {
      const last = this.steps.length - 1;
      const now = this.index === undefined ? (event.key === "ArrowLeft" ? last + 1 : -1) : this.index;
      const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.leave();
      if (next === undefined) return;
      event.preventDefault();
      this.show(Math.min(last, Math.max(0, next)));
    }

    leave() {
      this.index = undefined;
      this.cross.setAttribute("visibility", "hidden");
      tip.hidden = true;
    }

    show(index) {
      const step = this.steps[this.index = index], unit = this.data.unit;
      const at = this.x(step);
      this.cross.setAttribute("x1", at);
      this.cross.setAttribute("x2", at);
      this.cross.setAttribute("visibility", "visible");
      tip.replaceChildren(`step ${step}`);
      const lines = this.data.stack ? [...this.lines].reverse() : this.lines;
      for (const line of lines) {
        const i = line.x.indexOf(step);
        if (i < 0) continue;
        const row = document.createElement("div"), value = document.createElement("b");
        const swatch = this.swatch(line.key);
        value.textContent = measure((line.value || line.y)[i], unit);
        if (line.lo && !this.data.stack) value.textContent += ` (${number(line.lo[i])} – ${number(line.hi[i])})`;
        else if (line.raw) value.textContent += ` (this step ${number(line.raw[0][1][line.raw[0][0].indexOf(step)])})`;
        row.append(swatch.cloneNode(true), swatch.parentNode.textContent.trim(), value);
        tip.append(row);
      }
      if (this.data.stack) tip.append(`together ${measure(lines.length ? lines[0].y[this.lines[0].x.indexOf(step)] : 0, unit)}`);
      tip.hidden = false;
      const box = this.place.getBoundingClientRect(), size = tip.getBoundingClientRect();
      const right = box.left + at + 14;
      const x = right + size.width < root.clientWidth - 8 ? right : Math.max(8, box.left + at - 14 - size.width);
      tip.style.left = `${Math.min(x, root.clientWidth - 8 - size.width) + scrollX}px`;
      tip.style.top = `${box.top + 12 + scrollY}px`;
    }
  }

  const all = [];
  for (const section of document.querySelectorAll("section.charts")) {
    const hidden = new Set();
    const mine = [...section.querySelectorAll("figure")].map((figure, i) => new Chart(figure, charts[all.length + i], hidden));
    all.push(...mine);
    for (const button of section.querySelectorAll("button[data-key]")) {
      button.addEventListener("click", () => {
        const key = Number(button.dataset.key);
        if (!hidden.delete(key)) hidden.add(key);
        button.setAttribute("aria-pressed", !hidden.has(key));
        mine.forEach((chart) => chart.draw());
      });
    }
  }
  new ResizeObserver(() => all.forEach((chart) => chart.width !== chart.place.clientWidth && chart.draw())).observe(document.body);
  const raw = document.getElementById("raw");
  if (raw) {
    const show = () => root.classList.toggle("no-raw", !raw.checked);
    raw.addEventListener("change", show);
    show();
  }

  const theme = document.getElementById("theme");
  const preferred = () => matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const current = () => root.dataset.theme || preferred();
  const label = () => { theme.textContent = current() === "dark" ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = current() === "dark" ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();
})();
