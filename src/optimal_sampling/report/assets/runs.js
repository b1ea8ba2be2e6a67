"use strict";

const VERDICTS = {
  correct: "correct",
  wrong: "wrong",
  no_answer: "no answer",
  truncated: "truncated",
  skipped: "not gradable",
};

function runsSection(data) {
  const blocks = data.runs.map((run, i) => runBlock(run, i, data.runs.length > 1));
  return el("div", { class: `runs${data.runs.length > 1 ? " many" : ""}` }, blocks);
}

function runBlock(run, i, isOneOfMany) {
  const name = isOneOfMany
    ? el("h2", { class: "run-name" }, el("i", { class: `dot c${i % 6}` }), run.name)
    : null;
  return el(
    "div",
    { class: "run" },
    name,
    el("p", { class: "lead" }, source(run)),
    run.notes.map((note) => el("p", { class: "note" }, note)),
    el(
      "dl",
      { class: "figures" },
      figures(run).map(([title, value, under]) =>
        el(
          "div",
          {},
          el("dt", {}, title),
          el("dd", {}, value, under ? el("small", {}, under) : null),
        ),
      ),
    ),
    verdictBar(run),
    stageTable(run),
    errorLines(run),
    moreOf(run),
  );
}

/** Which models, and what was drawn from. */
function source(run) {
  const { student, teacher, mode, alpha_method: method } = run.options;
  if (!student) return "The models are not known.";
  if (run.stages.length)
    return ["Stages of ", role("student", student), " and ", role("teacher", teacher), "."];
  if (mode === "student" || mode === "teacher")
    return ["Drawn from the ", mode, " alone, ", role(mode, run.options[mode]), "."];
  return [
    "q* of ",
    role("student", student),
    " and ",
    role("teacher", teacher),
    ` by ${methodName(method)}.`,
  ];
}

const methodName = (name) =>
  String(name).replaceAll("_", " ").replace("kl ", "KL ").replace("ess ", "ESS ");

const role = (name, model) => el("span", { class: name, title: name }, model);

function figures(run) {
  const found = [];
  const right = run.accuracy;
  if (right) {
    const title = right.is_of_rows ? "Solved" : "Right answers";
    found.push([title, percent(right.value), `${interval(right)}, ${plural(right.rows, "row")}`]);
  }
  const missing = [
    run.failed ? `${count(run.failed)} failed` : "",
    run.owed ? `${count(run.owed)} owed` : "",
  ];
  found.push(["Samples", count(run.good), missing.filter(Boolean).join(", ")]);
  found.push([
    "Tokens",
    count(run.tokens),
    run.good ? `${short(run.tokens / run.good)} a sample` : "",
  ]);
  const means = Object.fromEntries(run.means);
  const alpha = means["alpha where the models differ"];
  if (run.profiles.alpha_differ && alpha !== undefined)
    found.push([
      "α where the models differ",
      short(alpha),
      `${short(means["alpha mean"])} over all tokens`,
    ]);
  const speed = run.calls.reduce((sum, call) => sum + call.tokens_per_second, 0);
  if (speed)
    found.push([
      "Tokens/s",
      count(Math.round(speed)),
      run.calls.length > 1 ? `sum of ${run.calls.length} shards` : "of the last call",
    ]);
  return found;
}

function verdictBar(run) {
  const total = Object.values(run.verdicts).reduce((a, b) => a + b, 0);
  if (!total) return null;
  const shares = Object.entries(run.verdicts);
  const ungraded = run.good - total;
  if (ungraded > 0) shares.push(["", ungraded]);
  return el(
    "div",
    {},
    el(
      "div",
      { class: "bar", "aria-hidden": "true" },
      shares.map(([name, n]) => sized(el("i", { class: `v-${name}` }), n)),
    ),
    el(
      "div",
      { class: "keys" },
      shares.map(([name, n]) =>
        el(
          "span",
          {},
          el("i", { class: `v-${name}` }),
          `${VERDICTS[name] || "not graded"} ${count(n)}`,
        ),
      ),
    ),
  );
}

function sized(node, share) {
  node.style.flex = `${share} 1 0`;
  return node;
}

function errorLines(run) {
  if (!run.errors.length) return null;
  const more = run.more_errors
    ? [el("p", { class: "small soft" }, `and ${plural(run.more_errors, "more reason")}`)]
    : [];
  return [
    ...run.errors.map(([text, n]) => el("p", { class: "error" }, `${count(n)} × failed: ${text}`)),
    ...more,
  ];
}

function moreOf(run) {
  const lengths = run.lengths.quantiles;
  const facts = [
    ...run.means.map(([title, value]) => [title, value.toFixed(4)]),
    ...Object.entries(lengths).map(([name, n]) => [`length, ${name}`, plural(n, "token")]),
    [
      "finish reasons",
      Object.entries(run.finish)
        .map(([name, n]) => `${name} ${count(n)}`)
        .join(", ") || "–",
    ],
    ...run.calls.map((call) => [
      "speed",
      `${count(call.tokens_per_second)} tokens/s: ` +
        `${count(call.tokens)} tokens in ${call.seconds} s, ${call.status}`,
    ]),
    ...run.calls.flatMap((call) => Object.entries(call.notes)),
    ["folder", run.path],
  ];
  return el(
    "details",
    { class: "more" },
    el("summary", {}, "Means, speed, options"),
    el("h3", {}, "The run"),
    facingTable(facts),
    el("h3", {}, "Options"),
    facingTable(
      Object.entries(run.options).map(([name, value]) => [optionName(name), shown(value)]),
    ),
  );
}

const optionName = (name) => `--${name.replaceAll("_", "-")}`;

const shown = (value) =>
  value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value);

function facingTable(rows) {
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      rows.map(([name, value]) =>
        el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)),
      ),
    ),
  );
}

function stageTable(run) {
  if (!run.stages.length) return null;
  const columns = ["prompts", "tries", "solved", "student_tokens", "teacher_tokens"];
  return el(
    "div",
    { class: "stages" },
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        {},
        el(
          "tr",
          {},
          ["stage", ...columns].map((name, i) =>
            el("th", { class: i ? "n" : null }, name.replace("_", "’s ")),
          ),
        ),
        run.stages.map((stage) =>
          el(
            "tr",
            {},
            el("td", {}, stage.name),
            columns.map((name) => el("td", { class: "n" }, count(stage[name]))),
          ),
        ),
      ),
    ),
  );
}

/** The options that are not the same in all runs. */
function differencesTable(data) {
  if (!data.differences.length) return null;
  return el(
    "details",
    { class: "more", open: data.differences.length < 9 },
    el("summary", {}, "Options in which the runs differ"),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        {},
        el(
          "tr",
          {},
          el("th"),
          data.runs.map((run, i) =>
            el("th", {}, el("i", { class: `dot c${i % 6}` }), ` ${run.name}`),
          ),
        ),
        data.differences.map((name) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, optionName(name)),
            data.runs.map((run) =>
              el("td", {}, name in run.options ? shown(run.options[name]) : "–"),
            ),
          ),
        ),
      ),
    ),
  );
}
