// The page: a chat for models that answer, prompt and panes for the others, and the settings. The URL always contains
// the current setup, so that it can be shared as a link. The API key is never part of it, and no conversation is.

import { fetchModels, hasKey, rememberKey } from "./api.js";
import { ChatView } from "./chat_view.js";
import { toClipboard } from "./clipboard.js";
import { problem, said } from "./notices.js";
import { Pane } from "./pane.js";
import { Settings } from "./settings.js";
import { Card } from "./tokens.js";

const find = (id) => document.getElementById(id);
const card = new Card(find("card"));
const settings = { text: new Settings(remember), chat: new Settings(remember, { chat: true }) };
const roomy = matchMedia("(min-width: 60rem)").matches; // on smaller screens the settings start folded
let models = []; // the entries of GET /models
let setsSystem = false; // whether the service sets the system prompt of every conversation
let votes = false; // whether it keeps votes on answers
let wantedView = ""; // "chat" or "text" if the link or the user has chosen one
let shownView = ""; // the one that is in the page
let remembering = 0; // the timer of `remember`
const hooks = { models: () => models, changed, said, copy, further, kept, refused, stale: load };
const panes = [new Pane(0, card, hooks), new Pane(1, card, hooks)];
const chat = new ChatView({ ...hooks, request, picked, compared, setsSystem: () => setsSystem, votes: () => votes });

function shown() {
  return find("compare").checked ? panes : panes.slice(0, 1);
}

// Whether the chosen model answers conversations; null until it is loaded for the first time.
function chats() {
  return models.find((entry) => entry.name === panes[0].model)?.chat ?? null;
}

function view() {
  if (chats() === false) return "text";
  return wantedView || (chats() ? "chat" : "text");
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
    ...(wantedView && chats() !== false ? [["view", wantedView]] : []),
    ...(prompt ? [["prompt", prompt]] : []),
    ...shown().map((pane, index) => [["model", "compare"][index], pane.wanted || pane.model]),
    ...settings[view()].differing(),
  ]);
  history.replaceState(null, "", `#${params}`);
}

function restore() {
  const params = new URLSearchParams(location.hash.slice(1));
  find("prompt").value = params.get("prompt") ?? "";
  find("compare").checked = params.has("compare");
  wantedView = ["chat", "text"].find((name) => name === params.get("view")) ?? (params.has("prompt") ? "text" : "");
  for (const form of Object.values(settings)) form.restore(params);
  panes[0].choose(params.get("model") ?? "");
  panes[1].choose(params.get("compare") ?? "");
  arrange();
}

// --- models ---

// Called when the page opens, when it becomes visible again, and when an unknown version answers. There is no timer,
// because an open page would then keep a service from scaling to zero.
async function load() {
  try {
    ({ models, system_prompt: setsSystem = false, feedback: votes = false } = await fetchModels());
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
  show(view());
  const two = find("compare").checked;
  chat.list(models, panes[0].model, two ? panes[1].model : "");
  find("examples").hidden = find("prompt").value !== ""; // so that an example never replaces typed text
  if (two && !panes[1].element.isConnected) find("panes").append(panes[1].element); // again would lose the focus
  if (!two) {
    panes[1].stop();
    panes[1].element.remove();
  }
  find("panes").classList.toggle("two", two);
  const contexts = shown().map((pane) => pane.entry?.context_length).filter(Boolean);
  if (contexts.length) for (const form of Object.values(settings)) form.limit(Math.max(...contexts));
}

function show(name) {
  find("views").hidden = chats() === false || models.length === 0;
  for (const button of find("views").children) button.setAttribute("aria-pressed", button.value === name);
  if (name === shownView) return;
  const held = document.activeElement?.closest("#ask, #panes, .chat"); // the focus is in the view that goes
  stop();
  shownView = name;
  document.body.classList.toggle("chatting", name === "chat");
  for (const id of ["ask", "panes", "legend"]) find(id).hidden = name === "chat";
  if (name === "chat") find("work").append(chat.element);
  else chat.element.remove();
  settings[name].show(find("controls"));
  find("settings").open = roomy && name === "text";
  if (held) (name === "chat" ? chat : panes[0]).find("select").focus();
}

// Chooses the model that the chat's is compared with, or none.
function compared(name) {
  find("compare").checked = name !== "";
  if (name) panes[1].choose(name);
  changed();
}

// Chooses the chat's model. One that only continues text has the other view.
function picked(name) {
  panes[0].choose(name);
  changed();
}

function changed() {
  arrange();
  remember();
}

// --- running ---

async function run() {
  const prompt = find("prompt").value;
  const body = request();
  find("stop").disabled = false;
  said("Running.");
  await Promise.all(shown().map((pane) => pane.run(prompt, body)));
  if (panes.some((pane) => pane.running)) return;
  if (document.activeElement === find("stop")) find("run").focus();
  find("stop").disabled = true;
}

function request() {
  settings[shownView].refuse(null);
  return settings[shownView].request();
}

function stop() {
  for (const part of [...panes, chat]) part.stop();
}

function further(text) {
  find("prompt").value += text;
  changed();
  find("ask").requestSubmit();
}

function kept(seed) {
  settings[shownView].set("seed", seed);
  remember();
  said("The seed is a setting now.");
}

async function copy(text) {
  await toClipboard(text);
  said("Copied.");
}

// --- errors ---

// Asks for a key if it is missing or wrong, and marks the setting that the error names.
function refused(error) {
  settings[shownView].refuse(error.param);
  if (error.param === "prompt") find("prompt").focus();
  if (error.status !== 401) return;
  find("unlock").hidden = false;
  find("key").focus();
}

// --- event listeners ---

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("stop").addEventListener("click", stop);
find("prompt").addEventListener("input", () => {
  wantedView = "text"; // so that the view does not change under a text once the models are known
  changed();
});
find("views").addEventListener("click", (event) => {
  if (event.target.localName !== "button") return;
  wantedView = event.target.value;
  changed();
});
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
  settings[shownView].restore(new Map());
  remember();
});
find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey(find("key").value);
  find("key").value = "";
  load();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && shownView === "text") {
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
restore();
load();
