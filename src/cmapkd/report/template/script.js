"use strict";
// Sorting, filters and copying. The page is complete without them; they read what it shows and send nothing.
(function () {
  function value(row, column) {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? null : Number(number);
  }

  function compare(first, second, column, sign) {
    const a = value(first, column), b = value(second, column);
    if (a !== null && b !== null) return sign * (a - b);
    if (a !== null || b !== null) return a === null ? 1 : -1; // what has no number stands last
    return sign * first.cells[column].textContent.localeCompare(second.cells[column].textContent, "en");
  }

  function sort(button) {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows);
    rows.sort((first, second) => compare(first, second, column, down ? -1 : 1));
    body.append(...rows);
  }

  for (const button of document.querySelectorAll("button.sort")) {
    button.addEventListener("click", () => sort(button));
  }

  for (const form of document.querySelectorAll("form.filters")) {
    const groups = Array.from(form.parentElement.querySelectorAll(".group"));
    const show = () => {
      const chosen = new FormData(form);
      let cards = 0;
      for (const group of groups) {
        const fits = ["outcome", "direction"].every((key) => !chosen.get(key) || chosen.get(key) === group.dataset[key]);
        group.hidden = !fits;
        if (fits) cards += group.querySelectorAll(".card").length;
      }
      form.querySelector("[data-shown]").textContent = cards + " cards shown";
    };
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    show();
  }

  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent.trim());
        button.textContent = "Copied";
      } catch (error) {
        button.textContent = "Not allowed here";
      }
    });
  }

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    for (const each of closed) each.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const each of closed) each.open = false;
  });
})();
