"use strict";

const SIDES = { left: 40, right: 8, top: 8, bottom: 24 };

const known = (values) =>
  values.map((value, place) => [place, value]).filter(([, value]) => value !== null);

function path(values, at, y) {
  return known(values)
    .map(([place, value], n) => `${n ? "L" : "M"}${at(place).toFixed(1)},${y(value).toFixed(1)}`)
    .join("");
}

function area(high, low, at, y) {
  const back = known(low)
    .reverse()
    .map(([place, value]) => `L${at(place).toFixed(1)},${y(value).toFixed(1)}`)
    .join("");
  return `${path(high, at, y)}${back}Z`;
}

function yAxis(values, y, width, form = String) {
  return svg(
    "g",
    {},
    values.map((value) => [
      svg("line", {
        class: "grid",
        x1: SIDES.left,
        x2: width - SIDES.right,
        y1: y(value),
        y2: y(value),
      }),
      svg("text", { x: SIDES.left - 8, y: y(value) + 4, "text-anchor": "end" }, form(value)),
    ]),
  );
}

function xAxis(values, x, height, name, form = count) {
  return svg(
    "g",
    {},
    values.map((value, i) =>
      svg(
        "text",
        { x: x(value), y: height - 6, "text-anchor": i ? "middle" : "start" },
        i || !name ? form(value) : `${name} ${form(value)}`,
      ),
    ),
  );
}

function logarithmic(width) {
  const [low, high] = [Math.log10(1e-5) - 0.12, Math.log10(20)];
  return (value) =>
    SIDES.left +
    (Math.max(0, Math.log10(Math.max(value, 1e-9)) - low) / (high - low)) *
      (width - SIDES.left - SIDES.right);
}

function steps(edges, shares, x, y, isFilled) {
  const gap = isFilled ? 0.6 : 0;
  const parts = shares.map((share, n) => {
    const [left, right] = [x(edges[n]) + gap, Math.max(x(edges[n]) + gap, x(edges[n + 1]) - gap)];
    return isFilled
      ? `M${left},${y(0)}V${y(share)}H${right}V${y(0)}Z`
      : `${n ? "L" : "M"}${left},${y(share)}H${right}`;
  });
  return parts.join("");
}
