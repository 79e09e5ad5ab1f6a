/* Before the first paint, so that the page never flashes in the other theme: hence no module. */
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("rorqual.theme");
  } catch {
    // Storage is closed: the system's theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
