// Copies text.

export async function toClipboard(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyByHand(text);
}

// On pages loaded over plain HTTP from another machine, browsers offer only this deprecated command.
function copyByHand(text) {
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}
