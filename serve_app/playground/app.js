// The page: prompt, settings and one or two panes. The URL always contains the current setup, so that it can be shared
// as a link. The API key is never part of it.

import { fetchModels, hasKey, rememberKey } from "./api.js";
import { Pane } from "./pane.js";
import { Settings } from "./settings.js";
import { Card } from "./tokens.js";

const find = (id) => document.getElementById(id);
const card = new Card(find("card"));
const settings = new Settings(find("controls"), remember);
const roomy = matchMedia("(min-width: 60rem)").matches; // on smaller screens the settings start folded
let models = []; // the entries of GET /models
let remembering = 0; // the timer of `remember`
const hooks = { models: () => models, changed, said, copy, further, kept, refused, stale: load };
const panes = [new Pane(0, card, hooks), new Pane(1, card, hooks)];

function shown() {
  return find("compare").checked ? panes : panes.slice(0, 1);
}

// --- the setup in the URL ---

// Waits a moment, since a slider moves often and browsers limit how often a page may change its URL.
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(writeAddress, 200);
}

function writeAddress() {
  const prompt = find("prompt").value;
  const params = new URLSearchParams([
    ...(prompt ? [["prompt", prompt]] : []),
    ...shown().map((pane, index) => [["model", "compare"][index], pane.wanted || pane.model]),
    ...settings.differing(),
  ]);
  history.replaceState(null, "", `#${params}`);
}

function restore() {
  const params = new URLSearchParams(location.hash.slice(1));
  find("prompt").value = params.get("prompt") ?? "";
  find("compare").checked = params.has("compare");
  settings.restore(params);
  panes[0].choose(params.get("model") ?? "");
  panes[1].choose(params.get("compare") ?? "");
  arrange();
}

// --- models ---

// Called when the page opens, when it becomes visible again, and when an unknown version answers. There is no timer,
// because an open page would then keep a service from scaling to zero.
async function load() {
  try {
    models = await fetchModels();
    problem(null);
    find("unlock").hidden = true;
  } catch (error) {
    problem(error.status === 401 && !hasKey() ? null : error); // then the form that asks for a key is enough
    refused(error);
  }
  for (const pane of panes) pane.list();
  arrange();
  const pane = models.length && shown().find((pane) => pane.missing);
  if (pane) problem({ message: `There is no model “${pane.wanted}” here; “${pane.model}” is chosen instead.` });
}

function arrange() {
  find("examples").hidden = find("prompt").value !== ""; // so that an example never replaces typed text
  const two = find("compare").checked;
  if (two && !panes[1].element.isConnected) find("panes").append(panes[1].element); // again would lose the focus
  if (!two) {
    panes[1].stop();
    panes[1].element.remove();
  }
  find("panes").classList.toggle("two", two);
  const contexts = shown().map((pane) => pane.entry?.context_length).filter(Boolean);
  if (contexts.length) settings.limit(Math.max(...contexts));
}

function changed() {
  arrange();
  remember();
}

// --- running ---

async function run() {
  const prompt = find("prompt").value;
  const body = settings.request();
  settings.refuse(null);
  find("stop").disabled = false;
  said("Running.");
  await Promise.all(shown().map((pane) => pane.run(prompt, body)));
  if (panes.some((pane) => pane.running)) return;
  if (document.activeElement === find("stop")) find("run").focus();
  find("stop").disabled = true;
}

function stop() {
  for (const pane of panes) pane.stop();
}

function further(text) {
  find("prompt").value += text;
  changed();
  find("ask").requestSubmit();
}

function kept(seed) {
  settings.set("seed", seed);
  remember();
  said("The seed is a setting now.");
}

async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyByHand(text);
  said("Copied.");
}

// On pages loaded over plain HTTP from another machine, browsers offer only this deprecated command.
function copyByHand(text) {
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

// --- errors and announcements ---

function problem(error) {
  find("problem").textContent = error?.message ?? "";
  find("problem").hidden = !error;
}

// Asks for a key if it is missing or wrong, and marks the setting that the error names.
function refused(error) {
  settings.refuse(error.param);
  if (error.param === "prompt") find("prompt").focus();
  if (error.status !== 401) return;
  find("unlock").hidden = false;
  find("key").focus();
}

function said(text) {
  find("said").textContent = text;
}

// --- event listeners ---

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("stop").addEventListener("click", stop);
find("prompt").addEventListener("input", changed);
find("examples").addEventListener("click", (event) => {
  if (event.target.localName !== "button") return;
  find("prompt").value = event.target.textContent;
  changed();
  find("ask").requestSubmit();
});
find("compare").addEventListener("change", changed);
find("tint").addEventListener("change", () => {
  find("panes").classList.toggle("tinted", find("tint").checked);
  find("scale").hidden = !find("tint").checked;
});
find("share").addEventListener("click", async () => {
  writeAddress();
  await copy(location.href);
});
find("reset").addEventListener("click", () => {
  settings.restore(new Map());
  remember();
});
find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey(find("key").value);
  find("key").value = "";
  load();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
  if (event.key === "Escape") {
    stop();
    card.hide();
  }
});
addEventListener("hashchange", restore);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && load());

find("panes").append(panes[0].element);
find("settings").open = roomy;
restore();
load();
