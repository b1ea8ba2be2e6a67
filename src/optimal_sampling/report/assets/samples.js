"use strict";

const FIELDS = [
  "run",
  "row",
  "sample",
  "id",
  "stage",
  "verdict",
  "answer",
  "reference",
  "finish",
  "tokens",
  "alpha",
  "kl_student",
  "kl_teacher",
  "vetoed",
  "error",
  "length",
];

const ORDERS = {
  place: ["Order of the dataset", null],
  tokens: ["Longest first", (a, b) => b.tokens - a.tokens],
  shortest: ["Shortest first", (a, b) => a.tokens - b.tokens],
  alpha: ["Highest α first", byColumn("alpha", -1), "alpha"],
  lowest: ["Lowest α first", byColumn("alpha", 1), "alpha"],
  kl_student: ["Farthest from the student", byColumn("kl_student", -1), "kl_student"],
  kl_teacher: ["Farthest from the teacher", byColumn("kl_teacher", -1), "kl_teacher"],
  vetoed: ["Most vetoed mass", byColumn("vetoed", -1), "vetoed"],
};

/** Samples without the number come last. */
function byColumn(name, sign) {
  return (a, b) => (a[name] === null) - (b[name] === null) || sign * (a[name] - b[name]);
}

function samplesSection(data) {
  if (!data.samples.length) return [null, () => {}];
  const samples = {
    runs: data.runs,
    metrics: data.metrics,
    chunk: data.chunk,
    entries: data.samples.map((values, index) => ({
      index,
      ...Object.fromEntries(FIELDS.map((name, n) => [name, values[n]])),
    })),
    view: { colour: "", marks: true, query: "", run: "", kind: "", stage: "", order: "place" },
  };
  samples.list = el("div", { id: "list" });
  samples.articles = samples.entries.map((entry) => placeholder(entry));
  samples.observer = new IntersectionObserver(
    (seen) => seen.forEach((each) => arrive(each, samples)),
    { rootMargin: `${NEAR}px 0px` },
  );
  listenToTokens(samples.list, samples);
  const section = el(
    "section",
    { id: "samples" },
    el("h2", {}, "Samples"),
    el("p", { class: "lead" }, chosenText(data.runs)),
    tools(samples),
    samples.list,
  );
  startColour(samples, data.columns);
  return [section, () => arrange(samples)];
}

/** Which samples of a larger run the page has. */
function chosenText(runs) {
  const cut = runs.filter((run) => run.shown < run.good + run.failed);
  const whole =
    "Point at a token, or go through a text with the arrow keys, " +
    "to see what the models said there.";
  if (!cut.length) return `All samples. ${whole}`;
  const shown = (run) => {
    const name = runs.length > 1 ? ` of ${run.name}` : "";
    return `${count(run.shown)} of ${count(run.good + run.failed)}${name}`;
  };
  const counts = cut.map(shown).join(", ");
  const which = "those whose hash of row and sample number is smallest, the same at every call";
  return `${counts}: ${which}. ${whole}`;
}

/**
 * What the tokens can be coloured by, and at first are: who led, where that is known, else α, or KL
 * to the student where most alphas are at their bounds.
 */
function startColour(samples, columns) {
  const metrics = samples.metrics.filter((metric) => columns.includes(metric.name));
  samples.colours.replaceChildren(
    ...metrics.map((metric) => el("option", { value: metric.name }, `Colour: ${metric.title}`)),
    el("option", { value: "" }, "No colour"),
  );
  const isClamped = samples.runs.every((run) => !(new Map(run.means).get("clamped share") < 0.5));
  const wanted = ["log_ratio", isClamped ? "kl_student" : "alpha"];
  const first =
    wanted.map((name) => metrics.find((metric) => metric.name === name)).find(Boolean) ||
    metrics[0];
  samples.view.colour = first ? first.name : "";
  samples.colours.value = samples.view.colour;
  recolour(samples);
}

function tools(samples) {
  const { view, entries } = samples;
  const change = (name, then) => (event) => {
    view[name] = event.target.type === "checkbox" ? event.target.checked : event.target.value;
    then(samples);
  };
  samples.colours = el("select", {
    id: "colour",
    "aria-label": "Colour tokens by",
    onchange: change("colour", recolour),
  });
  samples.legend = el("div", { class: "legend" });
  samples.search = el("input", {
    id: "search",
    type: "search",
    placeholder: "Search texts and prompts",
    "aria-label": "Search texts and prompts",
    oninput: later(change("query", arrange)),
  });
  const marks = el("input", {
    id: "marks",
    type: "checkbox",
    checked: true,
    onchange: change("marks", recolour),
  });
  return el(
    "div",
    { class: "tools", role: "search" },
    samples.search,
    filters(samples, change),
    select("order", "Order", ordersOf(entries), change("order", arrange)),
    samples.colours,
    el("label", {}, marks, "Spaces"),
    samples.legend,
  );
}

/** By run, verdict and stage, where there are several. */
function filters({ entries, runs }, change) {
  const stages = [...new Set(entries.map((entry) => entry.stage).filter(Boolean))];
  const choices = [
    ["run", "Run", runs.length > 1 ? runs.map((run, i) => [String(i), run.name]) : []],
    ["kind", "Verdict", kindsOf(entries)],
    ["stage", "Stage", stages.map((name) => [name, name])],
  ];
  return choices
    .filter(([, , options]) => options.length)
    .map(([id, label, options]) => {
      const all = ["", `All ${label.toLowerCase()}s`];
      return select(id, label, [all, ...options], change(id, arrange));
    });
}

/** Orders by numbers that some sample has. */
function ordersOf(entries) {
  const has = (column) => !column || entries.some((entry) => entry[column] !== null);
  return Object.entries(ORDERS)
    .filter(([, [, , column]]) => has(column))
    .map(([name, [title]]) => [name, title]);
}

function select(id, label, options, onchange) {
  return el(
    "select",
    { id, "aria-label": label, onchange },
    options.map(([value, title]) => el("option", { value }, title)),
  );
}

/** What a sample can be filtered by, with how many there are. */
function kindsOf(entries) {
  const counts = new Map();
  for (const entry of entries) counts.set(kindOf(entry), (counts.get(kindOf(entry)) || 0) + 1);
  const titles = { ...VERDICTS, failed: "failed", none: "not graded" };
  return Object.keys(titles)
    .filter((kind) => counts.has(kind))
    .map((kind) => [kind, `${titles[kind]} (${counts.get(kind)})`]);
}

const kindOf = (entry) => (entry.error ? "failed" : entry.verdict || "none");

function later(run) {
  let timer;
  return (event) => {
    clearTimeout(timer);
    timer = setTimeout(run, 120, event);
  };
}

/** Filter and sort: the articles that are left, in their order. */
async function arrange(samples) {
  const { view } = samples;
  const turn = (samples.turn = (samples.turn || 0) + 1);
  const found = view.query.trim() ? await matches(view.query.trim().toLowerCase(), samples) : null;
  if (turn !== samples.turn) return; // meanwhile something else was asked for
  const kept = samples.entries.filter(
    (entry) =>
      (!view.run || entry.run === Number(view.run)) &&
      (!view.kind || kindOf(entry) === view.kind) &&
      (!view.stage || entry.stage === view.stage) &&
      (!found || found.has(entry.index)),
  );
  const [, order] = ORDERS[view.order];
  if (order) kept.sort(order);
  samples.observer.disconnect();
  hideCard();
  samples.list.replaceChildren(...kept.map((entry) => samples.articles[entry.index]));
  if (!kept.length)
    samples.list.append(el("p", { class: "lead small" }, "No sample is like that."));
  for (const entry of kept) samples.observer.observe(samples.articles[entry.index]);
  document.getElementById("count").textContent =
    `${count(kept.length)} of ${plural(samples.entries.length, "sample")}`;
  highlight(samples);
}
