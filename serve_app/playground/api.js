// The service's HTTP routes as the page uses them: the models there are, and a generation as a stream of events.
//
// Addresses are relative to the page, so that it also works behind a proxy that serves it under a path.

const KEY = "api-key"; // in sessionStorage alone: gone with the tab, and never in a link

// An answer that was an error. `param` names the field that was refused, if one was.
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

// Calls a route; the response has a status below 400, anything else is a ServiceError.
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

// The entries of GET /models.
export async function fetchModels() {
  return (await (await call("models")).json()).models;
}

// Posts to /generate and yields each event's data as it comes. Ends when the service says so, throws a ServiceError
// for an error in midstream or a stream that is cut off, and an AbortError when `signal` is aborted.
export async function* generate(body, signal) {
  const response = await call("generate", { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServiceError(response.status, event.error);
    yield event;
  }
  throw new ServiceError(0, { message: "The connection was lost before the text was complete." });
}

// The data of server-sent events, one string each.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
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
    reader.cancel().catch(() => {}); // whoever stops listening frees the sequence's slot
  }
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new ServiceError(0, { message: "The connection was lost before the text was complete." });
}
