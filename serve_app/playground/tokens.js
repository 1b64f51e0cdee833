// Generated text as tokens that can be looked at: each knows its probability and what else was likely.
//
// In come the released text and the tokens' bytes and logprobs, which do not arrive in step: a token may be part of a
// character, and text that might begin a stop string is held back. Out come spans in the page. All text becomes text
// nodes, never markup.

// Bits of surprise (-log2 of the probability) from which a token is shown one step warmer.
const HEAT = [1, 2, 4, 6, 9];

export class TokenText {
  // Writes into `element`; `card` explains the token that is pointed at, touched or focused.
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
    this.released = ""; // what the service has released: all that may be shown
    this.length = 0; // how much of it is in the page
    this.pieces = []; // {length, tokens}, not in the page yet: the characters that one or more tokens make
    this.pending = []; // tokens that have not made a whole character yet
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.tokens = new WeakMap(); // span -> its tokens
    this.entrance = null; // the one span that the Tab key stops at; arrow keys go on from there
  }

  // `text` was released; `tokens` were generated. What belongs to what is found by counting characters.
  add(text, tokens) {
    this.released += text;
    for (const token of tokens) {
      this.pending.push(token);
      this.#piece(this.decoder.decode(Uint8Array.from(token.bytes), { stream: true }));
    }
    this.#paint((piece, left) => piece.length <= left);
  }

  // No more will come: a token is cut where the released text ends, and what belongs to no token is shown as it is.
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

// The card beside a token: the probability of what was chosen, and the likeliest alternatives.
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

  // Below the token, or above it where there is no room; never beyond the window's edges.
  #place() {
    const rect = this.owner.getClientRects()[0]; // of its first line, where a token is broken in two
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    const below = rect.bottom + 8 + height < innerHeight || rect.top < height + 8;
    style.top = `${below ? rect.bottom + 6 : rect.top - height - 6}px`;
    style.left = `${Math.max(8, Math.min(rect.left - 12, document.documentElement.clientWidth - width - 8))}px`;
  }
}

// One token's row in the card for each alternative, the chosen one marked, the likeliest first.
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

// A token's text with white space made visible, or its bytes in hexadecimal where they are no whole characters.
function visible(token) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(token.bytes));
    return (text || token.text).replace(/[ \n\t\r]/g, (space) => MARKS[space]);
  } catch {
    return token.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}
