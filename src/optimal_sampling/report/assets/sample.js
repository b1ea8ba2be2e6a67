"use strict";

const NEAR = 1400; // pixels around the window in which samples are made

async function detailOf(index, samples) {
  const chunk = await unpack(`texts-${Math.floor(index / samples.chunk)}`);
  return chunk[index % samples.chunk];
}

function placeholder(entry) {
  const article = el("article", { class: "sample", tabindex: -1, "data-index": entry.index });
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
  const run =
    samples.runs.length > 1
      ? el(
          "span",
          { class: "badge" },
          el("i", { class: `dot c${entry.run % 6}` }),
          samples.runs[entry.run].name,
        )
      : null;
  const kind = kindOf(entry);
  const sign = { correct: "✓", wrong: "✗", failed: "!" }[kind];
  const verdict =
    kind === "none"
      ? null
      : el(
          "span",
          { class: `badge ${kind === "failed" ? "wrong" : kind}` },
          sign ? `${sign} ` : "",
          VERDICTS[kind] || kind,
        );
  const answer =
    entry.answer !== null && entry.answer === entry.reference
      ? `answer ${entry.answer}`
      : [
          entry.answer !== null ? `answer ${entry.answer}` : "",
          entry.reference !== null ? `reference ${entry.reference}` : "",
        ]
          .filter(Boolean)
          .join(", ");
  const facts = [
    plural(entry.tokens, "token"),
    entry.finish === "length" ? "cut at the limit" : "",
    entry.alpha !== null ? `α ${short(entry.alpha)}` : "",
    entry.kl_student !== null
      ? `KL ${short(entry.kl_student)} to student, ${short(entry.kl_teacher)} to teacher`
      : "",
  ];
  const place = `Row ${entry.row}${entry.sample ? `, sample ${entry.sample}` : ""}`;
  return el(
    "header",
    {},
    el("span", { class: "place", title: `id ${entry.id}` }, place),
    run,
    entry.stage ? el("span", {}, entry.stage) : null,
    verdict,
    answer ? el("span", { class: "answer" }, answer) : null,
    el(
      "span",
      { class: "metrics", title: "α where the models differ; KL of q, nats per token" },
      facts.filter(Boolean).join(" · "),
    ),
  );
}

function promptOf(detail) {
  const first = detail.student || detail.teacher;
  if (!first) return "";
  const part = (title, text) => [
    el("h4", { class: title.toLowerCase() }, title),
    el("pre", {}, marked(text, false)),
  ];
  return el(
    "details",
    { class: "prompt" },
    el("summary", {}, first.slice(0, 300).replace(/\s+/g, " ")),
    detail.teacher
      ? [part("Student", detail.student), part("Teacher", detail.teacher)]
      : part("Both", detail.student),
  );
}

function body(entry, detail, samples) {
  const parts = [];
  const metric = samples.metrics.find((each) => each.name === samples.view.colour);
  if (entry.error) parts.push(el("p", { class: "error" }, entry.error));
  if (detail.pieces.length || detail.end)
    parts.push(...textOf(detail, metric, samples.metrics, samples.view.marks));
  else if (!entry.error) parts.push(el("p", { class: "small soft" }, "An empty completion."));
  if (detail.note) parts.push(el("p", { class: "small soft" }, `Not coloured: ${detail.note}.`));
  if (detail.detail) parts.push(el("p", { class: "small soft" }, `Verdict: ${detail.detail}.`));
  return parts;
}

/** Another colour, or other marks: the samples that are made are made again. */
function recolour(samples) {
  const metric = samples.metrics.find((each) => each.name === samples.view.colour);
  const hasColours = samples.colours.options.length > 1;
  const nothing = el(
    "span",
    {},
    hasColours ? "No colour." : "These samples have no numbers per token.",
  );
  samples.legend.replaceChildren(
    ...(metric ? legend(metric) : [nothing]),
    el(
      "span",
      { id: "count", "aria-live": "polite" },
      samples.legend.querySelector("#count")?.textContent || "",
    ),
  );
  const back = focusOf(samples.list);
  for (const article of samples.list.children) {
    if (!article.detail) continue;
    const entry = samples.entries[Number(article.dataset.index)];
    [...article.children].slice(1).forEach((child) => child.matches(".prompt") || child.remove());
    article.append(...body(entry, article.detail, samples));
  }
  back();
  highlight(samples);
}

/** Gives the focus back to a text or a token that was made again. */
function focusOf(list) {
  const focused = document.activeElement;
  const article = list.contains(focused) && focused.closest(".sample");
  if (!article || !focused.closest(".text")) return () => {};
  const { place } = focused.dataset;
  const again = place === undefined ? ".text" : `[data-place="${place}"]`;
  return () => article.querySelector(again)?.focus({ preventScroll: true });
}
