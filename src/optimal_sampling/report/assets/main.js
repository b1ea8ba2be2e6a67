"use strict";

const KEYS = [
  ["j", "next sample"],
  ["k", "previous sample"],
  ["← →", "tokens of a text, positions of a chart"],
  ["Esc", "close the card"],
  ["/", "search"],
  ["c", "another colour"],
  ["d", "light or dark"],
];

async function open() {
  const page = document.getElementById("page");
  if (!globalThis.DecompressionStream) {
    document.getElementById("message").textContent =
      "This browser cannot unpack the page (it has no DecompressionStream). " +
      "Chrome and Edge 123, Safari 17.5, Firefox 120 and their successors can.";
    return;
  }
  const data = await unpack("index");
  const names = [...data.runs, ...data.evaluations].map((each) => each.name).join(", ");
  const [samples, arrange] = samplesSection(data);
  const sections = [scoresSection(data), chartsSection(data), samples].filter(Boolean);
  page.replaceChildren(
    el("h1", {}, names),
    runsSection(data),
    differencesTable(data) || "",
    ...sections,
    foot(data),
  );
  const titles = { scores: "Scores", charts: "Along the completion", samples: "Samples" };
  document
    .getElementById("nav")
    .append(...sections.map((each) => el("a", { href: `#${each.id}` }, titles[each.id])));
  await arrange();
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
}

function foot(data) {
  return el(
    "footer",
    {},
    el(
      "div",
      {},
      KEYS.flatMap(([key, text]) => [el("kbd", {}, key), ` ${text}   `]),
    ),
    el(
      "p",
      {},
      `Optimal Sampling ${data.version}. `,
      "This file holds all that it shows and asks nothing of the network.",
    ),
  );
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  const button = document.getElementById("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(isDark()));
}

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
}

/** The sample before or after the one with the focus, or the one at the top of the window. */
function step(direction) {
  const articles = [...document.querySelectorAll(".sample")];
  const line = 125;
  const focused = articles.indexOf(document.activeElement.closest(".sample"));
  const here =
    focused >= 0
      ? focused
      : articles.findLastIndex((article) => article.getBoundingClientRect().top <= line);
  const next = articles[Math.max(0, Math.min(articles.length - 1, here + direction))];
  next?.scrollIntoView({ behavior: "instant", block: "start" });
  setTimeout(() => (next?.querySelector(".text") || next)?.focus({ preventScroll: true }), 60);
}

function nextColour() {
  const colours = document.getElementById("colour");
  colours.selectedIndex = (colours.selectedIndex + 1) % colours.options.length;
  colours.dispatchEvent(new Event("change"));
}

addEventListener("keydown", (event) => {
  if (
    event.target.matches("input, select, textarea") ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey
  )
    return;
  const action = {
    j: () => step(1),
    k: () => step(-1),
    c: nextColour,
    d: switchTheme,
    "/": () => document.getElementById("search")?.focus(),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
document.getElementById("theme").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
open();
