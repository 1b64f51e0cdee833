// A pane for one model: the choice of model, its text as it arrives, its speed, and where the model comes from.

import { generate } from "./api.js";
import { facts, lineage } from "./lineage.js";
import { TokenText } from "./tokens.js";

const CONTEXT = 400; // how many characters of the prompt are shown before the text
const NAMES = [{ model: "Model", answer: "Answer" }, { model: "Second model", answer: "Second answer" }];
export const ENDS = { stop: "end of text", length: "length reached", abort: "stopped", error: "failed" };

export class Pane {
  // `place`, 0 or 1, is the position of the default choice in the list of models. `on` has the page's functions:
  // models() returns the entries of GET /models, changed() is called when another model is chosen, said(text) announces
  // a text to screen readers, copy(text) copies it, further(text) appends it to the prompt, kept(seed) makes the seed a
  // setting, refused(error) marks the invalid setting, stale() reloads the entries after an unknown version answered.
  constructor(place, card, on) {
    this.element = document.getElementById("pane").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", NAMES[place].answer);
    this.find("header label").textContent = NAMES[place].model;
    this.find("header label").htmlFor = this.find(".model").id = `model-${place}`;
    this.place = place;
    this.on = on;
    this.wanted = ""; // the model to choose once it is listed
    this.answerer = null; // {model, version} of the last answer; a canary's differ from those requested
    this.aborter = null; // aborts the running request
    this.text = new TokenText(this.find(".text"), card);
    this.find(".model").addEventListener("change", () => {
      this.wanted = this.model;
      this.answerer = null;
      this.describe();
      on.changed();
    });
    this.find(".copy").addEventListener("click", () => on.copy(this.text.released));
    this.find(".further").addEventListener("click", () => on.further(this.text.released));
    this.find(".figures").addEventListener("click", (event) => {
      if (event.target.closest("button")) on.kept(event.target.textContent);
    });
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  get model() {
    return this.find(".model").value;
  }

  // The entry of the model that answered last; before the first answer, of the chosen one.
  get entry() {
    return this.on.models().find((entry) => entry.name === (this.answerer?.model ?? this.model));
  }

  get missing() {
    return this.wanted !== "" && this.wanted !== this.model;
  }

  get running() {
    return this.aborter !== null;
  }

  // Chooses a model, now or when it is listed.
  choose(name) {
    this.wanted = name;
    this.list();
  }

  // Updates the list of models. If the wanted one is not listed, another is chosen until it is.
  list() {
    const names = this.on.models().map((entry) => entry.name);
    const chosen = names.includes(this.wanted) ? this.wanted : (names[this.place] ?? names[0]);
    const options = names.map((name) => new Option(name, name, false, name === chosen));
    this.find(".model").replaceChildren(...options);
    this.describe();
  }

  // Shows what is known about the model.
  describe() {
    const entry = this.entry;
    this.find(".facts").textContent = entry ? facts(entry).join(" · ") : "";
    this.find(".lineage dl").replaceChildren(...(entry ? lineage(entry) : []));
    this.find(".lineage").hidden = !entry;
  }

  // Stops the running request, sends a new one, and shows its text as it arrives. Resolves when it has ended or failed.
  async run(prompt, settings) {
    this.stop();
    const aborter = (this.aborter = new AbortController());
    const loads = ["unloaded", "loading"].includes(this.entry?.state);
    const stops = settings.stop.length > 0;
    const clock = { started: performance.now(), tokens: 0, seed: settings.seed, loads, stops };
    const body = { ...settings, prompt, model: this.model || undefined };
    this.#begin(prompt, clock);
    try {
      for await (const event of generate(body, aborter.signal)) {
        if (aborter.signal.aborted) break;
        this.#take(event, clock);
      }
    } catch (error) {
      if (this.aborter === aborter && error.name !== "AbortError") this.#fail(error, clock);
    }
    await clock.listed;
    if (this.aborter !== aborter) return; // another request has started in this pane
    this.aborter = null;
    this.#finish(clock);
  }

  stop() {
    this.aborter?.abort();
  }

  #begin(prompt, clock) {
    this.text.clear();
    this.answerer = null;
    this.describe();
    this.find(".given").textContent = prompt.length > CONTEXT ? `…${prompt.slice(-CONTEXT)}` : prompt;
    this.find(".problem").hidden = true;
    this.find(".figures").replaceChildren(...figures(clock));
    this.find(".output").setAttribute("aria-busy", "true");
    this.element.classList.add("running");
    this.#offer(false);
  }

  #take(event, clock) {
    const [choice] = event.choices;
    const tokens = choice?.logprobs ?? [];
    if (tokens.length) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      clock.atFirst ??= tokens.length;
      clock.tokens += tokens.length;
    }
    clock.end = choice?.finish_reason ?? clock.end;
    this.text.add(choice?.text ?? "", tokens);
    this.find(".figures").replaceChildren(...figures(clock));
    if (!this.answerer) {
      this.answerer = { model: event.model, version: event.version };
      this.describe();
      if (this.entry?.version !== event.version) clock.listed = this.on.stale();
    }
  }

  #fail(error, clock) {
    const problem = this.find(".problem");
    problem.textContent = error.message;
    problem.hidden = false;
    clock.end = "error";
    this.on.refused(error);
  }

  #finish(clock) {
    clock.end ??= "abort";
    const { model, version } = this.answerer ?? {};
    if (version && (model !== this.model || version !== this.entry?.version)) clock.by = `${model} version ${version}`;
    this.text.end();
    this.find(".figures").replaceChildren(...figures(clock));
    this.find(".output").setAttribute("aria-busy", "false");
    this.element.classList.remove("running");
    this.#offer(this.text.released !== "");
    this.on.said(`${NAMES[this.place].answer}: ${ENDS[clock.end]} after ${clock.tokens} tokens.`);
  }

  #offer(there) {
    for (const name of [".copy", ".further"]) this.find(name).disabled = !there;
  }
}

// The figures of a request as elements of a <dl>. The speed does not include the time until the first token.
function figures({ started, first, last, atFirst, tokens, end, seed, by, loads, stops }) {
  const rows = [];
  if (loads && !first && !end) rows.push(["waiting", "the model is being loaded"]);
  if (first) rows.push(["first token", `${Math.round(first - started)} ms`]);
  if (last > first) rows.push(["speed", `${(((tokens - atFirst) * 1000) / (last - first)).toFixed(0)} tokens/s`]);
  if (first) rows.push(["tokens", `${tokens}`]);
  if (end) rows.push(["seed", `${seed}`]);
  if (by) rows.push(["by", by]);
  if (end) rows.push(["end", end === "stop" && stops ? "end of text or stop string" : ENDS[end]]);
  return rows.map(([name, value]) => {
    const figure = document.createElement("div");
    figure.className = "figure";
    figure.append(document.createElement("dt"), document.createElement("dd"));
    figure.firstChild.textContent = name;
    figure.lastChild.append(name === "seed" ? seedButton(value) : value);
    return figure;
  });
}

// Shows a seed, and makes it a setting when pressed.
export function seedButton(seed) {
  const button = document.createElement("button");
  return Object.assign(button, { type: "button", textContent: seed, title: "Use this seed again" });
}
