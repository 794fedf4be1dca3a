"use strict";
// Light, dark, or as the system says. The choice is kept where the browser lets a page keep anything.
(() => {
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let chosen = "system";
  const storage = (() => { try { return window.localStorage; } catch { return null; } })();
  const show = (theme) => {
    chosen = themes.includes(theme) ? theme : "system";
    if (chosen === "system") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  show(storage?.getItem("theme") ?? "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    show(themes[(themes.indexOf(chosen) + 1) % themes.length]);
    storage?.setItem("theme", chosen);
  });
})();
