"use strict";
const KEYS = {
  1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie", " ": "tie",
  s: "skip", S: "skip", u: "undo", U: "undo", Backspace: "undo",
};
let sent = false;
const form = document.querySelector("form");
form.addEventListener("submit", (event) => {
  // A second answer would be of a pair that nobody has seen yet.
  if (sent) event.preventDefault();
  sent = true;
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  // Space presses a button that has the focus.
  if (event.key === " " && event.target instanceof HTMLButtonElement) return;
  const button = form.querySelector(`button[value="${KEYS[event.key]}"]:enabled`);
  if (!button) return;
  event.preventDefault();
  form.requestSubmit(button);
});
// A page that the browser kept is of a pair that is answered.
addEventListener("pageshow", (event) => event.persisted && location.reload());
document.querySelector("h1").focus({ preventScroll: true });
