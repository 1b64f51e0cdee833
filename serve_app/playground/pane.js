// One model answering: which one, its text as it comes, how fast it came, and where the model comes from.

import { generate } from "./api.js";
import { facts, lineage } from "./lineage.js";
import { TokenText } from "./tokens.js";

const CONTEXT = 400; // characters of the prompt that are shown before the text
const NAMES = [{ model: "Model", answer: "Answer" }, { model: "Second model", answer: "Second answer" }];
const ENDS = { stop: "end of text", length: "length reached", abort: "stopped", error: "failed" };

export class Pane {
  // `place`, 0 or 1, says which of the models is chosen while none is wanted. `on` is the page: models() are the
  // entries of GET /models, changed() follows another choice of model, said(text) reads out, copy(text) copies,
  // further(text) puts the text behind the prompt, kept(seed) makes it a setting, refused(error) shows which setting
  // was wrong, stale() fetches the entries anew: a version answered that they do not have.
  constructor(place, card, on) {
    this.element = document.getElementById("pane").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", NAMES[place].answer);
    this.find("header label").textContent = NAMES[place].model;
    this.find("header label").htmlFor = this.find(".model").id = `model-${place}`;
    this.place = place;
    this.on = on;
    this.wanted = ""; // the model to choose once it is listed
    this.answerer = null; // {model, version} of the last answer; a canary's are not those that were asked for
    this.aborter = null; // of the request that runs
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

  // The listing's entry of what answered last, or else of what is chosen.
  get entry() {
    return this.on.models().find((entry) => entry.name === (this.answerer?.model ?? this.model));
  }

  get missing() {
    return this.wanted !== "" && this.wanted !== this.model;
  }

  get running() {
    return this.aborter !== null;
  }

  // Chooses a model, now or as soon as it is listed.
  choose(name) {
    this.wanted = name;
    this.list();
  }

  // Fills the chooser anew. What is wanted but not listed stays wanted, and another is chosen until it is.
  list() {
    const names = this.on.models().map((entry) => entry.name);
    const chosen = names.includes(this.wanted) ? this.wanted : (names[this.place] ?? names[0]);
    const options = names.map((name) => new Option(name, name, false, name === chosen));
    this.find(".model").replaceChildren(...options);
    this.describe();
  }

  // Writes what is known of the model.
  describe() {
    const entry = this.entry;
    this.find(".facts").textContent = entry ? facts(entry).join(" · ") : "";
    this.find(".lineage dl").replaceChildren(...(entry ? lineage(entry) : []));
    this.find(".lineage").hidden = !entry;
  }

  // Shows a request's text as it comes; resolves when it ended, however it ended. Ends the one before.
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
    if (this.aborter !== aborter) return; // another run has begun in this pane
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

// How it went, as elements of a <dl>. Speed counts from the first token, so that waiting for it is not part of it.
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

function seedButton(seed) {
  const button = document.createElement("button");
  return Object.assign(button, { type: "button", textContent: seed, title: "Use this seed again" });
}
