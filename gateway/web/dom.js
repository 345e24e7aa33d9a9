// Short names for the DOM functions that the page's modules use.

export const $ = (id) => document.getElementById(id);
export const all = (selector) => document.querySelectorAll(selector);

/** The value of the checked radio button of a group. */
export const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

export const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
