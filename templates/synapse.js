// Keeps /synapse.html up to date without losing one's place: focus, scroll, what is open and what
// was typed stay. The page itself does all it does also without this file.
"use strict";

(() => {
  const PERIOD_MS = 2000;
  const LONGEST_WAIT_MS = 20000;
  const ANSWER_MS = 10000;
  // Without what stood before the host: fetch refuses addresses with a password in them.
  const PAGE = location.origin + location.pathname;

  let failures = 0;
  let timer = 0;
  let turn = 0; // an answer to an earlier question than the last is dropped

  // Have `from` become like `to`, touching only what differs.
  function morph(from, to) {
    if (from.isEqualNode(to)) return;
    if (from.nodeType !== to.nodeType || from.nodeName !== to.nodeName || from.id !== to.id) {
      from.replaceWith(document.importNode(to, true));
    } else if (from.nodeType === Node.ELEMENT_NODE) {
      morphAttributes(from, to);
      morphChildren(from, to);
    } else if (from.nodeValue !== to.nodeValue) {
      from.nodeValue = to.nodeValue;
    }
  }

  function morphAttributes(from, to) {
    for (const { name } of [...from.attributes]) {
      if (!to.hasAttribute(name) && !isPersons(from, name)) from.removeAttribute(name);
    }
    for (const { name, value } of [...to.attributes]) {
      if (from.getAttribute(name) !== value && !isPersons(from, name)) from.setAttribute(name, value);
    }
  }

  // Whether a person, and not the page, decides over it: what stands open.
  function isPersons(element, name) {
    return element.nodeName === "DETAILS" && name === "open";
  }

  function morphChildren(from, to) {
    let here = from.firstChild;
    for (const wanted of [...to.childNodes]) {
      const match = find(from, here, wanted);
      if (match === null) {
        from.insertBefore(document.importNode(wanted, true), here);
        continue;
      }
      while (here !== match) here = removed(here);
      here = match.nextSibling;
      morph(match, wanted);
    }
    while (here !== null) here = removed(here);
  }

  function removed(node) {
    const next = node.nextSibling;
    node.remove();
    return next;
  }

  // The child, from `here` on, that becomes `wanted`: the one of the same id, or the next alike.
  // One that stands further on is taken only if nothing that is still wanted stands before it.
  function find(from, here, wanted) {
    if (wanted.id) {
      const found = document.getElementById(wanted.id);
      return found !== null && found.parentNode === from && isAfter(here, found) ? found : null;
    }
    return here !== null && !here.id && here.nodeName === wanted.nodeName ? here : null;
  }

  function isAfter(here, found) {
    return here !== null &&
      (here === found || (here.compareDocumentPosition(found) & Node.DOCUMENT_POSITION_FOLLOWING) !== 0);
  }

  function phases(root) {
    const rows = root.querySelectorAll("tr[data-name]");
    return new Map([...rows].map((row) => [row.dataset.name, row.dataset.phase]));
  }

  // For those who do not see it: what changed, in one sentence.
  function announce(before, after) {
    const said = [];
    for (const [name, phase] of after) {
      if (before.get(name) !== phase) said.push(`${name}: ${phase}`);
    }
    if (said.length) document.getElementById("announcer").textContent = said.slice(0, 5).join(", ");
  }

  const PARTS = ["act", "top", "main", "foot"];

  function take(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    if (!fresh.getElementById("main")) throw new Error("this is not the page");
    const before = phases(document);
    document.title = fresh.title;
    for (const id of PARTS) morph(document.getElementById(id), fresh.getElementById(id));
    announce(before, phases(document));
  }

  function sayOffline(text) {
    const place = document.getElementById("offline");
    if (place.textContent !== text) place.textContent = text;
    place.hidden = text === "";
  }

  async function ask(options) {
    const own = ++turn;
    const timeout = AbortSignal.timeout(ANSWER_MS);
    const answer = await fetch(PAGE, { credentials: "same-origin", signal: timeout, ...options });
    const text = await answer.text();
    const isPage = (answer.headers.get("Content-Type") || "").startsWith("text/html");
    if (!isPage) throw new Error(text.trim() || `status ${answer.status}`);
    if (own === turn) take(text);
  }

  async function refresh() {
    clearTimeout(timer);
    if (document.hidden) return; // goes on when it is looked at again
    try {
      await ask({});
      failures = 0;
    } catch (error) {
      failures += 1;
      if (failures > 1) sayOffline("supervisord does not answer: what stands here may be out of date.");
    }
    schedule();
  }

  function schedule() {
    clearTimeout(timer);
    timer = setTimeout(refresh, Math.min(PERIOD_MS * 2 ** failures, LONGEST_WAIT_MS));
  }

  async function submit(event) {
    const button = event.submitter;
    if (!button || button.getAttribute("aria-disabled") === "true") {
      event.preventDefault();
      return;
    }
    event.preventDefault();
    const form = event.target;
    const body = new URLSearchParams(new FormData(form));
    body.append(button.name, button.value);
    button.setAttribute("aria-disabled", "true");
    clearTimeout(timer);
    try {
      await ask({ method: "POST", body });
      if (form.id !== "act") form.reset();
    } catch (error) {
      sayOffline(`This could not be asked for: ${error.message}`);
    }
    button.removeAttribute("aria-disabled");
    schedule();
  }

  document.addEventListener("submit", submit);
  document.addEventListener("visibilitychange", refresh);
  schedule();
})();
