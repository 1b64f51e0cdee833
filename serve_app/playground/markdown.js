// Markdown as nodes of the page: the part of it that models write.
//
// Nothing is ever read as HTML: all text becomes text nodes. Only http and https addresses become links, and images
// are links too, so that a text from a model loads nothing. Unfinished marks are plain text, since an answer is shown
// while it arrives.

const DEEPEST = 8; // quotes, lists and emphasis within each other; what is deeper is plain text
const FARTHEST = 1000; // characters of an emphasis, so that a long text of opening marks takes no seconds
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const LINK = /\[([^\][\n]+)\]\(((?:[^()\s]|\([^()\s]*\))+)(?: "[^"\n]*")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]+/y;

// A fragment that shows `text`.
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replaceAll("\r\n", "\n").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [node, next] = KINDS.find(({ begins }) => begins(lines, at, depth)).read(lines, at, depth);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

// The kinds of blocks in the order in which they are tried: each reads one from line `at` on, and returns its element
// and the line after it.
const KINDS = [
  { begins: (lines, at) => FENCE.test(lines[at]), read: code },
  { begins: (lines, at) => HEADING.test(lines[at]), read: heading },
  { begins: (lines, at) => RULE.test(lines[at]), read: (lines, at) => [element("hr"), at + 1] },
  { begins: (lines, at, depth) => depth < DEEPEST && QUOTE.test(lines[at]), read: quote },
  { begins: (lines, at, depth) => depth < DEEPEST && ITEM.test(lines[at]), read: list },
  { begins: (lines, at) => isTable(lines, at), read: table },
  { begins: () => true, read: paragraph },
];

function code(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end].trim(), fence)) end += 1;
  const inner = element("code", lines.slice(at + 1, end).join("\n"));
  if (language.trim()) inner.dataset.language = language.trim().split(" ")[0];
  const outer = element("pre", inner);
  outer.tabIndex = 0; // so that the arrow keys can scroll it
  return [outer, end + 1];
}

function closes(line, fence) {
  return line.startsWith(fence) && line === fence[0].repeat(line.length);
}

// The page has headings of its own, so those of an answer begin at the third level.
function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return [element(`h${Math.min(6, marks.length + 2)}`, ...inline(text.trim())), at + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [element("blockquote", ...blocks(inner, depth + 1)), end];
}

// What is indented by two or more characters belongs to the item above it.
function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const numbered = /\d/.test(mark);
  const node = element(numbered ? "ol" : "ul");
  if (numbered) node.start = Number.parseInt(mark, 10);
  const belongs = (line) => line.search(/\S/) >= indent.length + 2;
  const begins = (line) => ITEM.test(line) && !RULE.test(line) && /\d/.test(ITEM.exec(line)[2]) === numbered;
  while (at < lines.length && begins(lines[at])) {
    const offset = ITEM.exec(lines[at])[0].length;
    const inner = [lines[at].slice(offset)];
    for (at += 1; at < lines.length && (belongs(lines[at]) || lines[at].trim() === ""); at += 1) {
      inner.push(lines[at].slice(Math.min(offset, Math.max(0, lines[at].search(/\S/)))));
    }
    node.append(element("li", ...blocks(inner, depth + 1)));
  }
  return [node, at];
}

function isTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  return lines[at].includes("|") && rule.includes("|") && cells(rule).every((cell) => /^:?-+:?$/.test(cell));
}

function table(lines, at) {
  const head = element("thead", row(lines[at], "th"));
  const body = element("tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(lines[at], "td"));
  const outer = element("div", element("table", head, body));
  outer.className = "table";
  outer.tabIndex = 0;
  return [outer, at];
}

function row(line, kind) {
  return element("tr", ...cells(line).map((cell) => element(kind, ...inline(cell))));
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function paragraph(lines, at, depth) {
  const plain = (next) => KINDS.find(({ begins }) => begins(lines, next, depth)).read === paragraph;
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && plain(end)) end += 1;
  return [element("p", ...inline(lines.slice(at, end).join("\n").trim())), end];
}

// --- within a line ---

// Strings and elements that show `text`.
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const span = depth < DEEPEST ? SPANS[text[at]]?.(text, at, depth) : null;
    if (span && plain) nodes.push(plain);
    if (span) plain = "";
    if (span) nodes.push(span.node);
    else plain += text[at];
    at += span?.length ?? 1;
  }
  return plain ? [...nodes, plain] : nodes;
}

// By its first character: reads a span at `at` and returns its node and length in the text, or null if there is none.
const SPANS = {
  "\\": (text, at) => (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], length: 2 } : null),
  "`": verbatim,
  "*": emphasis,
  "_": emphasis,
  "[": link,
  "!": image,
  h: address,
};

function verbatim(text, at) {
  const fence = run(text, at);
  let end = text.indexOf(fence, at + fence.length);
  while (end >= 0 && run(text, end).length !== fence.length) end = text.indexOf(fence, end + run(text, end).length);
  if (end < 0) return { node: fence, length: fence.length };
  const inner = text.slice(at + fence.length, end);
  return { node: element("code", inner.trim() || inner), length: end + fence.length - at };
}

// One mark is emphasis, two are strong, three are both. Underscores within a word are its own.
function emphasis(text, at, depth) {
  const mark = run(text, at);
  const within = mark[0] === "_" && /\w/.test(text[at - 1] ?? "");
  const end = mark.length > 3 || within || /\s/.test(text[at + mark.length] ?? " ") ? -1 : closing(text, at, mark);
  if (end < 0) return { node: mark, length: mark.length };
  const inner = inline(text.slice(at + mark.length, end), depth + 1);
  const strong = mark.length > 1 ? element("strong", ...inner) : null;
  const node = mark.length === 2 ? strong : element("em", ...(strong ? [strong] : inner));
  return { node, length: end + mark.length - at };
}

function closing(text, at, mark) {
  for (let end = text.indexOf(mark, at + mark.length); end >= 0 && end < at + FARTHEST; ) {
    const { length } = run(text, end);
    const after = text[end + length] ?? " ";
    const fits = length === mark.length || length === 3; // three can close what began with one, and leave two inside
    if (fits && !/\s/.test(text[end - 1]) && !(mark[0] === "_" && /\w/.test(after))) return end + length - mark.length;
    end = text.indexOf(mark, end + length);
  }
  return -1;
}

function link(text, at) {
  LINK.lastIndex = at;
  const [whole, label, target] = LINK.exec(text) ?? [];
  return /^https?:\/\//.test(target ?? "") ? { node: anchor(target, label), length: whole.length } : null;
}

function image(text, at) {
  const span = text[at + 1] === "[" ? link(text, at + 1) : null;
  return span && { ...span, length: span.length + 1 };
}

function address(text, at) {
  ADDRESS.lastIndex = at;
  if (/\w/.test(text[at - 1] ?? "") || !ADDRESS.test(text)) return null;
  let end = ADDRESS.lastIndex;
  while (".,;:!?)]*_".includes(text[end - 1])) end -= 1;
  const target = text.slice(at, end);
  return { node: anchor(target, target), length: target.length };
}

function anchor(target, label) {
  return Object.assign(element("a", label), { href: target, target: "_blank", rel: "noopener noreferrer" });
}

// The characters from `at` on that are the same as the one there.
function run(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return text.slice(at, end);
}

function element(kind, ...content) {
  const node = document.createElement(kind);
  node.append(...content);
  return node;
}
