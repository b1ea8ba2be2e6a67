"use strict";

/** Indices of the samples whose prompts, text, answer or id hold the words. */
async function matches(query, samples) {
  if (!samples.haystack) {
    samples.haystack = Promise.all(
      samples.entries.map(async (entry) => {
        const detail = await detailOf(entry.index, samples);
        return [
          detail.pieces.join(""),
          detail.student,
          detail.teacher,
          entry.answer,
          entry.reference,
          entry.error,
          entry.id,
        ]
          .join("\n")
          .toLowerCase();
      }),
    );
  }
  const texts = await samples.haystack;
  return new Set(texts.flatMap((text, index) => (text.includes(query) ? [index] : [])));
}

/** Mark what was searched for, across the tokens. */
function highlight(samples) {
  if (!globalThis.CSS?.highlights) return;
  const query = samples.view.query.trim().toLowerCase();
  const ranges = query
    ? [...samples.list.querySelectorAll(".text, .prompt pre")].flatMap((node) =>
        rangesIn(node, query),
      )
    : [];
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
  for (
    let at = text.indexOf(query);
    at >= 0 && ranges.length < 200;
    at = text.indexOf(query, at + query.length)
  ) {
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
