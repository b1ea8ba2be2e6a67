"use strict";

const FIELDS = ["run", "row", "sample", "id", "stage", "verdict", "answer", "reference", "finish", "tokens", "alpha", "kl_student", "kl_teacher", "vetoed", "error", "length"];
const NEAR = 1400; // pixels around the window in which samples are made

const ORDERS = {
  place: ["Order of the dataset", null],
  tokens: ["Longest first", (a, b) => b.tokens - a.tokens],
  shortest: ["Shortest first", (a, b) => a.tokens - b.tokens],
  alpha: ["Highest α first", byColumn("alpha", -1)],
  lowest: ["Lowest α first", byColumn("alpha", 1)],
  kl_student: ["Farthest from the student", byColumn("kl_student", -1)],
  kl_teacher: ["Farthest from the teacher", byColumn("kl_teacher", -1)],
  vetoed: ["Most vetoed mass", byColumn("vetoed", -1)],
};

/** Samples without the number come last. */
function byColumn(name, sign) {
  return (a, b) => (a[name] === null) - (b[name] === null) || sign * (a[name] - b[name]);
}

function samplesSection(data) {
  if (!data.samples.length) return [null, () => {}];
  const samples = {
    runs: data.runs, metrics: data.metrics, chunk: data.chunk,
    entries: data.samples.map((values, index) => ({ index, ...Object.fromEntries(FIELDS.map((name, n) => [name, values[n]])) })),
    view: { colour: "", marks: true, query: "", run: "", kind: "", stage: "", order: "place" },
  };
  samples.list = el("div", { id: "list" });
  samples.articles = samples.entries.map((entry) => placeholder(entry));
  samples.observer = new IntersectionObserver((seen) => seen.forEach((each) => arrive(each, samples)), { rootMargin: `${NEAR}px 0px` });
  listenToTokens(samples.list, samples);
  const section = el("section", { id: "samples" }, el("h2", {}, "Samples"), el("p", { class: "lead" }, chosenText(data.runs)), tools(samples), samples.list);
  startColour(samples, data.columns);
  return [section, () => arrange(samples)];
}

/** Which samples of a larger run the page has. */
function chosenText(runs) {
  const cut = runs.filter((run) => run.shown < run.good + run.failed);
  const whole = "Point at a token, or go through a text with the arrow keys, to see what the models said there.";
  if (!cut.length) return `All samples. ${whole}`;
  const counts = cut.map((run) => `${count(run.shown)} of ${count(run.good + run.failed)}${runs.length > 1 ? ` of ${run.name}` : ""}`).join(", ");
  return `${counts}: those whose hash of row and sample number is smallest, the same at every call. ${whole}`;
}

/** What the tokens can be coloured by, and at first are: who led, where that is known, else α, or KL to the student where
 * most alphas are at their bounds. */
function startColour(samples, columns) {
  const metrics = samples.metrics.filter((metric) => columns.includes(metric.name));
  samples.colours.replaceChildren(...metrics.map((metric) => el("option", { value: metric.name }, `Colour: ${metric.title}`)), el("option", { value: "" }, "No colour"));
  const isClamped = samples.runs.every((run) => !(new Map(run.means).get("clamped share") < 0.5));
  const wanted = ["log_ratio", isClamped ? "kl_student" : "alpha"];
  const first = wanted.map((name) => metrics.find((metric) => metric.name === name)).find(Boolean) || metrics[0];
  samples.view.colour = first ? first.name : "";
  samples.colours.value = samples.view.colour;
  recolour(samples);
}

async function detailOf(index, samples) {
  const chunk = await unpack(`texts-${Math.floor(index / samples.chunk)}`);
  return chunk[index % samples.chunk];
}

function tools(samples) {
  const { view, entries, runs } = samples;
  const change = (name, then) => (event) => {
    view[name] = event.target.type === "checkbox" ? event.target.checked : event.target.value;
    then(samples);
  };
  samples.colours = el("select", { id: "colour", "aria-label": "Colour tokens by", onchange: change("colour", recolour) });
  samples.legend = el("div", { class: "legend" });
  samples.search = el("input", { id: "search", type: "search", placeholder: "Search texts and prompts", "aria-label": "Search texts and prompts", oninput: later(change("query", arrange)) });
  const orders = Object.entries(ORDERS).filter(([name]) => !["alpha", "kl_student", "kl_teacher", "vetoed"].includes(name) && name !== "lowest" || entries.some((entry) => entry[name === "lowest" ? "alpha" : name] !== null));
  const stages = [...new Set(entries.map((entry) => entry.stage).filter(Boolean))];
  return el("div", { class: "tools", role: "search" },
    samples.search,
    runs.length > 1 ? select("run", "Run", [["", "All runs"], ...runs.map((run, i) => [String(i), run.name])], change("run", arrange)) : null,
    select("kind", "Verdict", [["", "All verdicts"], ...kindsOf(entries)], change("kind", arrange)),
    stages.length ? select("stage", "Stage", [["", "All stages"], ...stages.map((name) => [name, name])], change("stage", arrange)) : null,
    select("order", "Order", orders.map(([name, [title]]) => [name, title]), change("order", arrange)),
    samples.colours,
    el("label", {}, el("input", { id: "marks", type: "checkbox", checked: true, onchange: change("marks", recolour) }), "Spaces"),
    samples.legend);
}

function select(id, label, options, onchange) {
  return el("select", { id, "aria-label": label, onchange }, options.map(([value, title]) => el("option", { value }, title)));
}

/** What a sample can be filtered by, with how many there are. */
function kindsOf(entries) {
  const counts = new Map();
  for (const entry of entries) counts.set(kindOf(entry), (counts.get(kindOf(entry)) || 0) + 1);
  const titles = { ...VERDICTS, failed: "failed", none: "not graded" };
  return Object.keys(titles).filter((kind) => counts.has(kind)).map((kind) => [kind, `${titles[kind]} (${counts.get(kind)})`]);
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
  const found = view.query.trim() ? await matches(view.query.trim().toLowerCase(), samples) : null;
  const kept = samples.entries.filter((entry) =>
    (!view.run || entry.run === Number(view.run)) && (!view.kind || kindOf(entry) === view.kind) &&
    (!view.stage || entry.stage === view.stage) && (!found || found.has(entry.index)));
  const [, order] = ORDERS[view.order];
  if (order) kept.sort(order);
  samples.observer.disconnect();
  hideCard();
  samples.list.replaceChildren(...kept.map((entry) => samples.articles[entry.index]));
  if (!kept.length) samples.list.append(el("p", { class: "lead small" }, "No sample is like that."));
  for (const entry of kept) samples.observer.observe(samples.articles[entry.index]);
  document.getElementById("count").textContent = `${count(kept.length)} of ${plural(samples.entries.length, "sample")}`;
  highlight(samples);
}

/** Indices of the samples whose prompts, text, answer or id hold the words. */
async function matches(query, samples) {
  if (!samples.haystack) {
    samples.haystack = Promise.all(samples.entries.map(async (entry) => {
      const detail = await detailOf(entry.index, samples);
      return [detail.pieces.join(""), detail.student, detail.teacher, entry.answer, entry.reference, entry.error, entry.id].join("\n").toLowerCase();
    }));
  }
  const texts = await samples.haystack;
  return new Set(texts.flatMap((text, index) => (text.includes(query) ? [index] : [])));
}

/** Mark what was searched for, across the tokens. */
function highlight(samples) {
  if (!globalThis.CSS?.highlights) return;
  const query = samples.view.query.trim().toLowerCase();
  const ranges = query ? [...samples.list.querySelectorAll(".text, .prompt pre")].flatMap((node) => rangesIn(node, query)) : [];
  CSS.highlights.set("search", new Highlight(...ranges));
}

function rangesIn(node, query) {
  const nodes = [];
  let text = "";
  for (const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT); walker.nextNode();) {
    nodes.push([text.length, walker.currentNode]);
    text += walker.currentNode.data.toLowerCase();
  }
  const ranges = [];
  for (let at = text.indexOf(query); at >= 0 && ranges.length < 200; at = text.indexOf(query, at + query.length)) {
    const range = new Range();
    range.setStart(...pointAt(nodes, at));
    range.setEnd(...pointAt(nodes, at + query.length, true));
    ranges.push(range);
  }
  return ranges;
}

function pointAt(nodes, offset, isEnd = false) {
  const [start, node] = nodes.findLast(([from]) => from < offset || (!isEnd && from === offset));
  return [node, Math.min(node.data.length, offset - start)];
}

function placeholder(entry) {
  const article = el("article", { class: "sample", "data-index": entry.index });
  article.style.minHeight = `${130 + 28 * Math.min(60, Math.ceil(entry.length / 100))}px`;
  return article;
}

/** Make a sample that comes near the window, and empty one that has gone far away. */
async function arrive({ target, isIntersecting }, samples) {
  if (isIntersecting && !target.firstChild) await make(target, samples);
  if (!isIntersecting && target.firstChild && !target.contains(document.activeElement)) {
    target.style.minHeight = `${target.offsetHeight}px`;
    target.replaceChildren();
    target.detail = null;
  }
}

async function make(article, samples) {
  const entry = samples.entries[Number(article.dataset.index)];
  const detail = await detailOf(entry.index, samples);
  if (article.firstChild) return; // asked for twice
  article.detail = detail;
  article.append(header(entry, samples), promptOf(detail), ...body(entry, detail, samples));
  article.style.minHeight = "";
  if (samples.view.query) highlight(samples);
}

function header(entry, samples) {
  const run = samples.runs.length > 1 ? el("span", { class: "badge" }, el("i", { class: `dot c${entry.run % 6}` }), samples.runs[entry.run].name) : null;
  const kind = kindOf(entry);
  const sign = { correct: "✓", wrong: "✗", failed: "!" }[kind];
  const verdict = kind === "none" ? null : el("span", { class: `badge ${kind === "failed" ? "wrong" : kind}` }, sign ? `${sign} ` : "", VERDICTS[kind] || kind);
  const answer = entry.answer !== null && entry.answer === entry.reference ? `answer ${entry.answer}`
    : [entry.answer !== null ? `answer ${entry.answer}` : "", entry.reference !== null ? `reference ${entry.reference}` : ""].filter(Boolean).join(", ");
  const facts = [plural(entry.tokens, "token"), entry.finish === "length" ? "cut at the limit" : "", entry.alpha !== null ? `α ${short(entry.alpha)}` : "",
    entry.kl_student !== null ? `KL ${short(entry.kl_student)} to student, ${short(entry.kl_teacher)} to teacher` : ""];
  const place = `Row ${entry.row}${entry.sample ? `, sample ${entry.sample}` : ""}`;
  return el("header", {}, el("span", { class: "place", title: `id ${entry.id}` }, place), run, entry.stage ? el("span", {}, entry.stage) : null, verdict,
    answer ? el("span", { class: "answer" }, answer) : null,
    el("span", { class: "metrics", title: "α where the models differ; KL of q, nats per token" }, facts.filter(Boolean).join(" · ")));
}

function promptOf(detail) {
  const first = detail.student || detail.teacher;
  if (!first) return "";
  const part = (title, text) => [el("h4", { class: title.toLowerCase() }, title), el("pre", {}, marked(text, false))];
  return el("details", { class: "prompt" }, el("summary", {}, first.slice(0, 300).replace(/\s+/g, " ")),
    detail.teacher ? [part("Student", detail.student), part("Teacher", detail.teacher)] : part("Both", detail.student));
}

function body(entry, detail, samples) {
  const parts = [];
  const metric = samples.metrics.find((each) => each.name === samples.view.colour);
  if (entry.error) parts.push(el("p", { class: "error" }, entry.error));
  if (detail.pieces.length || detail.end) parts.push(...textOf(detail, metric, samples.metrics, samples.view.marks));
  else if (!entry.error) parts.push(el("p", { class: "small soft" }, "An empty completion."));
  if (detail.note) parts.push(el("p", { class: "small soft" }, `Not coloured: ${detail.note}.`));
  if (detail.detail) parts.push(el("p", { class: "small soft" }, `Verdict: ${detail.detail}.`));
  return parts;
}

/** Another colour, or other marks: the samples that are made are made again. */
function recolour(samples) {
  const metric = samples.metrics.find((each) => each.name === samples.view.colour);
  const hasColours = samples.colours.options.length > 1;
  const nothing = el("span", {}, hasColours ? "No colour." : "These samples have no numbers per token.");
  samples.legend.replaceChildren(...(metric ? legend(metric) : [nothing]), el("span", { id: "count", "aria-live": "polite" }, samples.legend.querySelector("#count")?.textContent || ""));
  for (const article of samples.list.children) {
    if (!article.detail) continue;
    const entry = samples.entries[Number(article.dataset.index)];
    [...article.children].slice(1).forEach((child) => child.matches(".prompt") || child.remove());
    article.append(...body(entry, article.detail, samples));
  }
  highlight(samples);
}
