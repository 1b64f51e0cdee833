// A client for the service's HTTP routes: lists the models, and streams the events of a text or an answer.
//
// URLs are relative to the page, so that it also works behind a proxy that serves it under a path.

const KEY = "api-key"; // in sessionStorage only: it is deleted with the tab and never part of a link

// An error reply. `param` names the invalid field, if there is one.
export class ServiceError extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `The service answered with status ${status}.`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

export function rememberKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

// Calls a route. Throws a ServiceError unless the response is successful.
async function call(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, { message: "The service cannot be reached." });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ServiceError(response.status, body.error);
}

// The reply of GET /models.
export async function fetchModels() {
  return (await call("models")).json();
}

// Posts to /generate and yields each event as it arrives. Throws what `stream` does.
export function generate(body, signal) {
  return stream("generate", body, signal);
}

// Posts a conversation to OpenAI's route and yields each event as it arrives. Throws what `stream` does.
export function converse(body, signal) {
  return stream("v1/chat/completions", body, signal);
}

// Sends a vote on an answer.
export async function vote(body) {
  await call("v1/feedback", { method: "POST", body: JSON.stringify(body) });
}

// Yields each event's data until [DONE]. Throws a ServiceError if the stream contains an error or breaks off, and an
// AbortError when `signal` is aborted.
async function* stream(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServiceError(response.status, event.error);
    yield event;
  }
  throw new ServiceError(0, { message: "The connection was lost before the text was complete." });
}

// Yields the data of each server-sent event as a string.
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost);
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, so that the service frees the slot
  }
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new ServiceError(0, { message: "The connection was lost before the text was complete." });
}
