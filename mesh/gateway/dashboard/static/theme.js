// Before anything is drawn: the theme this browser was told, else the system's.
(() => {
  let choice = "auto";
  try { choice = localStorage.getItem("mesh-theme") || "auto"; } catch { /* storage may be off */ }
  document.documentElement.dataset.theme = choice;
})();
