// Shows generated text as tokens, each with its probability and its alternatives.
//
// Takes the released text and the tokens' bytes and logprobs, and makes spans. Text and tokens do not arrive together:
// a token may be part of a character, and the service holds text back that may be the start of a stop string. All text
// becomes text nodes, never markup.

// Thresholds in bits of surprise (-log2 of the probability); above each, a token's colour is one step warmer.
const HEAT = [1, 2, 4, 6, 9];

export class TokenText {
  // Writes into `element`; `card` shows the token under the pointer or with the focus.
  constructor(element, card) {
    this.element = element;
    this.card = card;
    this.clear();
    element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this.#show(event.target));
    element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && card.hide());
    element.addEventListener("focusin", (event) => this.#enter(event.target));
    element.addEventListener("focusout", () => card.hide());
    element.addEventListener("click", (event) => this.#show(event.target));
    element.addEventListener("keydown", (event) => this.#walk(event));
  }

  clear() {
    this.card.hide();
    this.element.replaceChildren();
    this.released = ""; // the text from the service so far
    this.length = 0; // how many characters of it are in the page
    this.pieces = []; // {length, tokens} not in the page yet: characters, and the tokens that encode them
    this.pending = []; // tokens of an incomplete character
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.tokens = new WeakMap(); // span -> its tokens
    this.entrance = null; // the only span that the Tab key reaches; arrow keys move from there
  }

  // Adds released text and generated tokens, which are matched by counting characters.
  add(text, tokens) {
    this.released += text;
    for (const token of tokens) {
      this.pending.push(token);
      this.#piece(this.decoder.decode(Uint8Array.from(token.bytes), { stream: true }));
    }
    this.#paint((piece, left) => piece.length <= left);
  }

  // Ends the text: the last token is cut where the released text ends, and text without a token is shown unchanged.
  end() {
    this.#piece(this.decoder.decode());
    this.#paint((piece, left) => left > 0);
    this.element.append(this.released.slice(this.length));
    this.length = this.released.length;
  }

  #piece(text) {
    if (!text || !this.pending.length) return;
    this.pieces.push({ length: text.length, tokens: this.pending });
    this.pending = [];
  }

  #paint(ready) {
    while (this.pieces.length && ready(this.pieces[0], this.released.length - this.length)) {
      const { length, tokens } = this.pieces.shift();
      const span = document.createElement("span");
      span.textContent = this.released.slice(this.length, this.length + length);
      span.className = `token heat-${heat(tokens)}`;
      span.tabIndex = this.entrance ? -1 : 0;
      this.entrance ??= span;
      this.tokens.set(span, tokens);
      this.element.append(span);
      this.length += span.textContent.length;
    }
  }

  #show(span) {
    if (this.tokens.has(span)) this.card.show(span, this.tokens.get(span));
  }

  #enter(span) {
    this.entrance.tabIndex = -1;
    span.tabIndex = 0;
    this.entrance = span;
    this.#show(span);
  }

  #walk(event) {
    const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const span = next && event.target[next];
    if (!span) return;
    event.preventDefault();
    span.focus();
  }
}

// The card beside a token: its probability, and the likeliest alternatives.
export class Card {
  constructor(element) {
    this.element = element;
    this.owner = null;
    addEventListener("scroll", () => this.owner && this.#place(), { capture: true, passive: true });
    document.addEventListener("click", (event) => event.target.closest(".token, .card") || this.hide());
  }

  show(span, tokens) {
    this.hide();
    this.owner = span;
    span.setAttribute("aria-describedby", this.element.id);
    this.element.replaceChildren(...tokens.map(table));
    this.element.hidden = false;
    this.#place();
  }

  hide() {
    this.owner?.removeAttribute("aria-describedby");
    this.owner = null;
    this.element.hidden = true;
  }

  // Below the token, or above it if there is no room; never beyond the window's edges.
  #place() {
    const rect = this.owner.getClientRects()[0]; // the first line of a token that wraps
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    const below = rect.bottom + 8 + height < innerHeight || rect.top < height + 8;
    style.top = `${below ? rect.bottom + 6 : rect.top - height - 6}px`;
    style.left = `${Math.max(8, Math.min(rect.left - 12, document.documentElement.clientWidth - width - 8))}px`;
  }
}

// A list with one row per alternative, the likeliest first; the chosen one is marked.
function table(token) {
  const alternatives = token.top.some((other) => other.token_id === token.token_id) ? token.top : [...token.top, token];
  const list = document.createElement("ol");
  for (const other of alternatives) {
    const row = list.appendChild(document.createElement("li"));
    row.classList.toggle("chosen", other.token_id === token.token_id);
    row.append(cell("name", visible(other)), cell("bar", ""), cell("share", percent(Math.exp(other.logprob))));
    row.querySelector(".bar").style.setProperty("--share", Math.exp(other.logprob));
  }
  return list;
}

function cell(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

function heat(tokens) {
  const bits = -tokens.reduce((sum, token) => sum + token.logprob, 0) / Math.LN2;
  return HEAT.filter((least) => bits >= least).length;
}

function percent(share) {
  if (share >= 0.9995) return "100%";
  return share < 0.0001 ? "<0.01%" : `${(100 * share).toFixed(share < 0.01 ? 2 : 1)}%`;
}

const MARKS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };

// A token's text with visible white space, or its bytes in hexadecimal if they are not whole characters.
function visible(token) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(token.bytes));
    return (text || token.text).replace(/[ \n\t\r]/g, (space) => MARKS[space]);
  } catch {
    return token.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}
