"use strict";

const CHARTS = {
  alpha: { title: "α", of: "weight of the teacher", most: 1 },
  alpha_differ: {
    title: "α where the models differ",
    of: "weight of the teacher, of tokens at which KL(q, student) or KL(q, teacher) is above 0.001",
    most: 1,
  },
  kl_student: { title: "KL to student", of: "KL(q, student), nats", isLogarithmic: true },
  kl_teacher: { title: "KL to teacher", of: "KL(q, teacher), nats", isLogarithmic: true },
  vetoed: {
    title: "Vetoed mass",
    of: "student’s mass outside of the teacher’s support",
    most: 1,
  },
};

function chartsSection(data) {
  const names = Object.keys(CHARTS).filter((name) => data.runs.some((run) => run.profiles[name]));
  const lengths = data.runs.some((run) => run.good);
  if (!names.length && !lengths) return null;
  const state = { name: names.includes("alpha_differ") ? "alpha" : names[0] };
  const body = el("div");
  const draw = () => body.replaceChildren(...chartBody(data, state.name, lengths));
  const tabs = el(
    "div",
    { class: "tabs" },
    names.map((name) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(name === state.name),
          onclick: (event) => {
            state.name = name;
            for (const tab of tabs.children)
              tab.setAttribute("aria-pressed", String(tab === event.target));
            draw();
          },
        },
        CHARTS[name].title,
      ),
    ),
  );
  onResize(body, draw);
  return el(
    "section",
    { id: "charts" },
    el("h2", {}, "Along the completion"),
    el(
      "p",
      { class: "lead" },
      "Over all tokens of all records. The line is the mean, the dashes are the median, the bands " +
        "hold 50% and 80% of the tokens; grey: the share of samples that are that long.",
    ),
    tabs,
    body,
  );
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
  const having = data.runs
    .map((run, i) => ({ run, i, profile: run.profiles[name] }))
    .filter((each) => each.profile);
  const half = width > 880 ? (width - 56) / 2 : width;
  const wide = having.length > 1 ? half : width;
  const span = Math.max(0, ...having.map(({ profile }) => profile.n.length * profile.width));
  const most =
    CHARTS[name]?.most ||
    Math.max(0, ...having.map(({ profile }) => Math.max(...profile.quantiles[4], ...profile.mean)));
  const panels = having.map((each) =>
    profilePanel(each, { name, width: wide, span, most, isNamed: data.runs.length > 1 }),
  );
  const bars = [
    having.length
      ? histogramFigure(
          CHARTS[name].of,
          having.map(({ profile, i }) => shareOf(profile, i)),
          { ...CHARTS[name], width: half },
        )
      : null,
    lengths ? lengthFigure(data, half) : null,
  ].filter(Boolean);
  return [el("div", { class: "panels" }, panels), el("section", { class: "pair" }, bars)];
}

/** Mean, median and bands along the position. */
function profilePanel({ run, i, profile }, { name, width, span, most, isNamed }) {
  const height = 230;
  const x = (token) => SIDES.left + (token / span) * (width - SIDES.left - SIDES.right);
  const y = (value) =>
    height - SIDES.bottom - (value / (most || 1)) * (height - SIDES.top - SIDES.bottom);
  const mean = short(profile.total_mean);
  const chart = svg(
    "svg",
    {
      class: `c${i % 6}`,
      tabindex: 0,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": `${CHARTS[name].of}, by position, of ${run.name}: mean ${mean}`,
    },
    yAxis(ticks(most, 4), y, width),
    xAxis(ticks(span, width / 110), x, height, run.unit),
    profileShapes(profile, x, y, most),
  );
  const title = isNamed ? [el("i", { class: `dot c${i % 6}` }), ` ${run.name}`] : CHARTS[name].of;
  const caption = el("figcaption", { "aria-live": "polite" }, title);
  const about = { profile, x, span, name: isNamed ? `${run.name}, ` : "", unit: run.unit };
  followPointer(chart, caption, about);
  return el("figure", {}, caption, chart);
}

function profileShapes(profile, x, y, most) {
  const at = (place) => x((place + 0.5) * profile.width);
  const [q10, q25, q50, q75, q90] = profile.quantiles;
  const alive = profile.n.map((n) => (most * 0.12 * n) / profile.n[0]);
  const ground = profile.n.map(() => 0);
  return [
    svg("path", { class: "alive", d: area(alive, ground, at, y) }),
    svg("path", { class: "band", "fill-opacity": 0.13, d: area(q90, q10, at, y) }),
    svg("path", { class: "band", "fill-opacity": 0.2, d: area(q75, q25, at, y) }),
    svg("path", { class: "median", d: path(q50, at, y) }),
    svg("path", { class: "line", d: path(profile.mean, at, y) }),
  ];
}

/** A line at the position under the pointer or of the arrow keys, its numbers in the caption. */
function followPointer(chart, caption, { profile, x, span, name, unit }) {
  const still = [...caption.childNodes];
  const height = Number(chart.getAttribute("height"));
  const hair = svg("line", { class: "hair", y1: SIDES.top, y2: height - SIDES.bottom });
  let place = -1;
  const show = (wanted) => {
    place = Math.max(0, Math.min(profile.n.length - 1, wanted));
    for (const end of ["x1", "x2"]) hair.setAttribute(end, x((place + 0.5) * profile.width));
    chart.append(hair);
    caption.textContent = name + numbersAt(profile, place, unit);
  };
  const leave = () => {
    place = -1;
    hair.remove();
    caption.replaceChildren(...still);
  };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const part = (event.clientX - box.left - SIDES.left) / (box.width - SIDES.left - SIDES.right);
    show(Math.floor((part * span) / profile.width));
  });
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(place + step);
  });
  for (const end of ["pointerleave", "blur"]) chart.addEventListener(end, leave);
}

function numbersAt(profile, place, unit) {
  const [low, quarter, , three, high] = profile.quantiles.map((column) => short(column[place]));
  const first = place * profile.width;
  const where =
    profile.width > 1 ? `${unit}s ${first}–${first + profile.width - 1}` : `${unit} ${first}`;
  return [
    where,
    `mean ${short(profile.mean[place])}`,
    `50% in ${quarter}–${three}`,
    `80% in ${low}–${high}`,
    `n ${count(profile.n[place])}`,
  ].join("; ");
}

/** The share of tokens in each bin. */
function shareOf(profile, i) {
  const total = profile.histogram.reduce((a, b) => a + b, 0);
  return {
    i,
    edges: profile.edges,
    shares: profile.histogram.map((n) => n / total),
    mean: profile.total_mean,
  };
}

function lengthFigure(data, width) {
  const series = data.runs
    .map((run, i) => ({ run, i }))
    .filter(({ run }) => run.good)
    .map(({ run, i }) => ({
      i,
      edges: [
        ...run.lengths.counts.map((_, n) => n * run.lengths.width),
        run.lengths.counts.length * run.lengths.width,
      ],
      shares: run.lengths.counts.map((n) => n / run.good / run.lengths.width),
    }));
  return histogramFigure("length of a completion, tokens", series, { width, of: "length" });
}

/** One series as columns, several as steps. The height is the share of a bin. */
function histogramFigure(title, series, { width, isLogarithmic, most }) {
  const height = 170;
  const last = most || Math.max(...series.map(({ edges }) => edges.at(-1)));
  const highest = Math.max(...series.flatMap(({ shares }) => shares)) || 1;
  const x = isLogarithmic
    ? logarithmic(width)
    : (value) => SIDES.left + (value / last) * (width - SIDES.left - SIDES.right);
  const y = (share) =>
    height - SIDES.bottom - (share / highest) * (height - SIDES.top - SIDES.bottom);
  const marks = isLogarithmic ? [1e-5, 1e-3, 0.01, 0.1, 1, 10] : ticks(last, width / 110);
  const shape = ({ i, edges, shares }) =>
    svg("path", {
      class: series.length > 1 ? `line c${i % 6} dash${i % 6}` : `columns c${i % 6}`,
      d: steps(edges, shares, x, y, series.length === 1),
    });
  const dots = series.map(({ i }) => [el("i", { class: `dot c${i % 6}` }), " "]);
  const caption = el("figcaption", {}, title, series.length > 1 ? ["; ", dots] : null);
  const tickText = isLogarithmic ? (v) => (v === 1e-5 ? "≤ 1e-5" : short(v)) : count;
  return el(
    "figure",
    {},
    caption,
    svg(
      "svg",
      {
        height,
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        "aria-label": `Histogram: ${title}`,
      },
      svg("line", {
        class: "axis",
        x1: SIDES.left,
        x2: width - SIDES.right,
        y1: height - SIDES.bottom,
        y2: height - SIDES.bottom,
      }),
      xAxis(marks, x, height, "", tickText),
      series.map(shape),
    ),
  );
}
