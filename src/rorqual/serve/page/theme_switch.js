/** The three-way switch of the theme: the system's, light, dark. */
import { readText, storageArea, writeText } from "./store.js";

const KEY = "rorqual.theme"; // theme.js reads it before the first paint

/** @param {HTMLElement} group holds one radio button for each theme */
export function startThemeSwitch(group) {
  const radios = [...group.querySelectorAll("input")];
  const show = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    for (const radio of radios) radio.checked = radio.value === theme;
  };
  const stored = () => {
    const theme = readText(storageArea("localStorage"), KEY, "");
    return theme === "light" || theme === "dark" ? theme : "";
  };
  group.addEventListener("change", (event) => {
    writeText(storageArea("localStorage"), KEY, event.target.value);
    show(event.target.value);
  });
  window.addEventListener("storage", (event) => {
    if (event.key === KEY) show(stored());
  });
  show(stored());
}
