// Shows an entry of GET /models: as short facts, and as a list of where the model comes from.

const STATES = { unloaded: "loads on first use", loading: "loading", failed: "cannot be used" };

// The facts beside the model's name.
export function facts(entry) {
  const known = [
    STATES[entry.state],
    entry.version && `version ${entry.version}`,
    entry.bits_per_byte != null && `${entry.bits_per_byte.toFixed(3)} bits/byte`,
    entry.parameters && `${millions(entry.parameters)} parameters`,
    entry.context_length && `context ${entry.context_length}`,
  ];
  return known.filter(Boolean);
}

// The content of a <dl>: one group for each known value.
export function lineage(entry) {
  const rows = [
    ["Source", entry.source],
    ["Alias", entry.alias && `@${entry.alias}`],
    ["Version", entry.version],
    ["MLflow run", link(short(entry.run_id), entry.run_url)],
    ["Bits per byte", entry.bits_per_byte?.toFixed(4)],
    ["Parameters", entry.parameters?.toLocaleString("en")],
    ["Context", entry.context_length && `${entry.context_length.toLocaleString("en")} tokens`],
    ["Data", entry.data],
    ["Data fingerprint", short(entry.data_fingerprint)],
    ["Git commit", short(entry.git_commit)],
    ["Loaded", entry.loaded_at && new Date(entry.loaded_at).toLocaleString()],
    ["Runs on", entry.runner && `${entry.runner}, ${entry.dtype}`],
    ["Canary", entry.canary_share && `${100 * entry.canary_share}% of the default model's requests`],
    ["Problem", entry.error],
  ];
  return rows
    .filter(([, value]) => value)
    .map(([name, value]) => cell("div", cell("dt", name), cell("dd", ...breakable(value))));
}

function cell(kind, ...content) {
  const element = document.createElement(kind);
  element.append(...content);
  return element;
}

// Lets long paths and URLs wrap after a slash.
function breakable(value) {
  if (typeof value !== "string") return [value];
  return value.split(/(?<=\/)/).flatMap((part) => [part, document.createElement("wbr")]);
}

// The first digits of a long hexadecimal id, with the whole id as tooltip.
function short(id) {
  return id && Object.assign(document.createElement("span"), { title: id, textContent: id.slice(0, 12) });
}

// Only an http URL becomes a link, since tags in the registry may contain any text.
function link(content, address) {
  if (!content || !/^https?:\/\//.test(address ?? "")) return content;
  const anchor = Object.assign(document.createElement("a"), { href: address, target: "_blank", rel: "noopener" });
  anchor.append(content);
  return anchor;
}

function millions(count) {
  return count < 1e9 ? `${(count / 1e6).toFixed(count < 1e8 ? 1 : 0)} M` : `${(count / 1e9).toFixed(1)} B`;
}
