// The conversations that this browser keeps, in localStorage: the latest first, and no more than a bounded size.
//
// Each call reads the stored list anew, so that two tabs do not overwrite each other's conversations.

const KEY = "conversations";
const CURRENT = "conversation";
const MOST = 100; // conversations
const SPACE = 2_000_000; // characters; browsers allow some five million for all of an origin

// The conversations, the latest first. What is stored in another form, by another release or by hand, is left out.
export function stored() {
  try {
    const list = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(list) ? list.filter(sound) : [];
  } catch {
    return []; // no JSON, or a browser that is set to keep nothing
  }
}

// Keeps a conversation as the latest; the oldest ones are forgotten if there is no room. Returns whether it is kept.
export function keep(conversation) {
  return write([conversation, ...stored().filter((other) => other.id !== conversation.id)]);
}

export function forget(id) {
  write(stored().filter((other) => other.id !== id));
}

// The id of the conversation that this tab shows, which a reload opens again; another tab begins its own.
export function current() {
  return sessionStorage.getItem(CURRENT);
}

export function setCurrent(id) {
  sessionStorage.setItem(CURRENT, id);
}

// Forgets the oldest until the rest fits. What is stored stays as it is if the latest alone does not.
function write(list) {
  for (let count = Math.min(list.length, MOST); count >= Math.min(list.length, 1); count -= 1) {
    const text = JSON.stringify(list.slice(0, count));
    if (text.length > SPACE) continue;
    try {
      localStorage.setItem(KEY, text);
      return true;
    } catch {
      // full: try again with one less
    }
  }
  return false;
}

function sound(one) {
  const named = typeof one?.id === "string" && typeof one.system === "string";
  return named && Array.isArray(one.turns) && one.turns.every(isTurn);
}

function isTurn(turn) {
  const asked = typeof turn?.question === "string" && Array.isArray(turn.answers) && turn.answers.length > 0;
  return asked && turn.answers.every((answer) => typeof answer?.text === "string");
}
