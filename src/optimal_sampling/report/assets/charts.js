"use strict";

const CHARTS = {
  alpha: { title: "α", of: "weight of the teacher", most: 1 },
  alpha_differ: { title: "α where the models differ", of: "weight of the teacher, of tokens at which KL(q, student) or KL(q, teacher) is above 0.001", most: 1 },
  kl_student: { title: "KL to student", of: "KL(q, student), nats", isLogarithmic: true },
  kl_teacher: { title: "KL to teacher", of: "KL(q, teacher), nats", isLogarithmic: true },
  vetoed: { title: "Vetoed mass", of: "student’s mass outside of the teacher’s support", most: 1 },
};
const SIDES = { left: 40, right: 8, top: 8, bottom: 24 };

function chartsSection(data) {
  const names = Object.keys(CHARTS).filter((name) => data.runs.some((run) => run.profiles[name]));
  const lengths = data.runs.some((run) => run.good);
  if (!names.length && !lengths) return null;
  const state = { name: names.includes("alpha_differ") ? "alpha" : names[0] };
  const body = el("div");
  const draw = () => body.replaceChildren(...chartBody(data, state.name, lengths));
  const tabs = el("div", { class: "tabs" }, names.map((name) =>
    el("button", { type: "button", "aria-pressed": String(name === state.name), onclick: (event) => {
      state.name = name;
      for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab === event.target));
      draw();
    } }, CHARTS[name].title)));
  onResize(body, draw);
  return el("section", { id: "charts" }, el("h2", {}, "Along the completion"),
    el("p", { class: "lead" }, "Over all tokens of all records. The line is the mean, the dashes are the median, the bands hold 50% and 80% of the tokens; grey: the share of samples that are that long."),
    tabs, body);
}

function onResize(node, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(node.clientWidth - width) < 2) return;
    width = node.clientWidth;
    draw();
  }).observe(node);
}

function chartBody(data, name, lengths) {
  const width = document.getElementById("page").clientWidth - 2 * (innerWidth > 640 ? 32 : 18);
  const having = data.runs.map((run, i) => ({ run, i, profile: run.profiles[name] })).filter((each) => each.profile);
  const half = width > 880 ? (width - 56) / 2 : width;
  const wide = having.length > 1 ? half : width;
  const span = Math.max(0, ...having.map(({ profile }) => profile.n.length * profile.width));
  const most = CHARTS[name]?.most || Math.max(0, ...having.map(({ profile }) => Math.max(...profile.quantiles[4], ...profile.mean)));
  const panels = having.map((each) => profilePanel(each, { name, width: wide, span, most, isNamed: data.runs.length > 1 }));
  const bars = [
    having.length ? histogramFigure(CHARTS[name].of, having.map(({ profile, i }) => shareOf(profile, i)), { ...CHARTS[name], width: half }) : null,
    lengths ? lengthFigure(data, half) : null,
  ].filter(Boolean);
  return [el("div", { class: "panels" }, panels), el("section", { class: "pair" }, bars)];
}

/** Mean, median and bands along the position. */
function profilePanel({ run, i, profile }, { name, width, span, most, isNamed }) {
  const height = 230;
  const x = (token) => SIDES.left + (token / span) * (width - SIDES.left - SIDES.right);
  const y = (value) => height - SIDES.bottom - (value / (most || 1)) * (height - SIDES.top - SIDES.bottom);
  const at = (place) => x((place + 0.5) * profile.width);
  const [q10, q25, q50, q75, q90] = profile.quantiles;
  const caption = el("figcaption", {}, isNamed ? [el("i", { class: `dot c${i % 6}` }), ` ${run.name}`] : CHARTS[name].of);
  const hair = svg("line", { class: "hair", y1: SIDES.top, y2: height - SIDES.bottom, visibility: "hidden" });
  const label = `${CHARTS[name].of}, by position, of ${run.name}: mean ${short(profile.total_mean)}`;
  const chart = svg("svg", { class: `c${i % 6}`, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    yAxis(ticks(most, 4), y, width), xAxis(ticks(span, width / 110), x, height, "token"),
    svg("path", { class: "alive", d: area(profile.n.map((n) => (most * 0.12 * n) / profile.n[0]), profile.n.map(() => 0), at, y) }),
    svg("path", { class: "band", "fill-opacity": 0.13, d: area(q90, q10, at, y) }),
    svg("path", { class: "band", "fill-opacity": 0.2, d: area(q75, q25, at, y) }),
    svg("path", { class: "median", d: path(q50, at, y) }), svg("path", { class: "line", d: path(profile.mean, at, y) }), hair);
  const still = [...caption.childNodes];
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const token = ((event.clientX - box.left - SIDES.left) / (box.width - SIDES.left - SIDES.right)) * span;
    const place = Math.max(0, Math.min(profile.n.length - 1, Math.floor(token / profile.width)));
    hair.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) hair.setAttribute(end, at(place));
    const tokens = profile.width > 1 ? `tokens ${place * profile.width}–${(place + 1) * profile.width - 1}` : `token ${place}`;
    caption.textContent = `${isNamed ? `${run.name}, ` : ""}${tokens}: mean ${short(profile.mean[place])}, 50% in ${short(q25[place])}–${short(q75[place])}, 80% in ${short(q10[place])}–${short(q90[place])}, n ${count(profile.n[place])}`;
  });
  chart.addEventListener("pointerleave", () => {
    hair.setAttribute("visibility", "hidden");
    caption.replaceChildren(...still);
  });
  return el("figure", {}, caption, chart);
}

const known = (values) => values.map((value, place) => [place, value]).filter(([, value]) => value !== null);

function path(values, at, y) {
  return known(values).map(([place, value], n) => `${n ? "L" : "M"}${at(place).toFixed(1)},${y(value).toFixed(1)}`).join("");
}

function area(high, low, at, y) {
  const back = known(low).reverse().map(([place, value]) => `L${at(place).toFixed(1)},${y(value).toFixed(1)}`).join("");
  return `${path(high, at, y)}${back}Z`;
}

function yAxis(values, y, width, form = String) {
  return svg("g", {}, values.map((value) => [
    svg("line", { class: "grid", x1: SIDES.left, x2: width - SIDES.right, y1: y(value), y2: y(value) }),
    svg("text", { x: SIDES.left - 8, y: y(value) + 4, "text-anchor": "end" }, form(value)),
  ]));
}

function xAxis(values, x, height, name, form = count) {
  return svg("g", {}, values.map((value, i) => svg("text", { x: x(value), y: height - 6, "text-anchor": i ? "middle" : "start" }, i || !name ? form(value) : `${name} ${form(value)}`)));
}

/** The share of tokens in each bin. */
function shareOf(profile, i) {
  const total = profile.histogram.reduce((a, b) => a + b, 0);
  return { i, edges: profile.edges, shares: profile.histogram.map((n) => n / total), mean: profile.total_mean };
}

function lengthFigure(data, width) {
  const series = data.runs.map((run, i) => ({ run, i })).filter(({ run }) => run.good).map(({ run, i }) => ({
    i,
    edges: [...run.lengths.counts.map((_, n) => n * run.lengths.width), run.lengths.counts.length * run.lengths.width],
    shares: run.lengths.counts.map((n) => n / run.good / run.lengths.width),
  }));
  return histogramFigure("length of a completion, tokens", series, { width, of: "length" });
}

/** One series as columns, several as steps. The height is the share of a bin. */
function histogramFigure(title, series, { width, isLogarithmic, most }) {
  const height = 170;
  const last = most || Math.max(...series.map(({ edges }) => edges.at(-1)));
  const highest = Math.max(...series.flatMap(({ shares }) => shares)) || 1;
  const x = isLogarithmic ? logarithmic(width) : (value) => SIDES.left + (value / last) * (width - SIDES.left - SIDES.right);
  const y = (share) => height - SIDES.bottom - (share / highest) * (height - SIDES.top - SIDES.bottom);
  const marks = isLogarithmic ? [1e-5, 1e-3, 0.01, 0.1, 1, 10] : ticks(last, width / 110);
  const shape = ({ i, edges, shares }) => svg("path", {
    class: series.length > 1 ? `line c${i % 6} dash${i % 6}` : `columns c${i % 6}`, d: steps(edges, shares, x, y, series.length === 1),
  });
  const caption = el("figcaption", {}, title, series.length > 1 ? el("span", {}, "; ", series.map(({ i }) => [el("i", { class: `dot c${i % 6}` }), " "])) : null);
  return el("figure", {}, caption, svg("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram: ${title}` },
    svg("line", { class: "axis", x1: SIDES.left, x2: width - SIDES.right, y1: height - SIDES.bottom, y2: height - SIDES.bottom }),
    xAxis(marks, x, height, "", isLogarithmic ? (v) => (v === 1e-5 ? "≤ 1e-5" : short(v)) : count), series.map(shape)));
}

function logarithmic(width) {
  const [low, high] = [Math.log10(1e-5) - 0.12, Math.log10(20)];
  return (value) => SIDES.left + (Math.max(0, Math.log10(Math.max(value, 1e-9)) - low) / (high - low)) * (width - SIDES.left - SIDES.right);
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
