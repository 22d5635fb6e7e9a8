"use strict";
// The values under the pointer, of every curve of a chart. Listeners stand on the document: a page that follows a run
// replaces what is in <main>.
const tip = document.getElementById("tip");
const hide = () => {
  tip.hidden = true;
  for (const cursor of document.querySelectorAll(".cursor")) cursor.setAttribute("transform", "");
};
document.addEventListener("pointermove", (event) => {
  hide();
  const svg = event.target.closest ? event.target.closest("svg.chart") : null;
  if (!svg) return;
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const curves = JSON.parse(svg.dataset.curves);
  let at = null;
  const lines = [];
  for (const [name, points] of curves) {
    const nearest = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    if (at === null || Math.abs(nearest[0] - x) < Math.abs(at[0] - x)) at = nearest;
    lines.push([name, nearest]);
  }
  const shown = lines.map(([name, point]) => name + " " + point[2] + (point[1] === at[1] ? "" : " (at " + point[1] + ")"));
  tip.textContent = svg.dataset.x + " " + at[1] + "\n" + shown.join("\n");
  svg.querySelector(".cursor").setAttribute("transform", "translate(" + (at[0] + 9) + ")");
  tip.hidden = false;
  tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 16 + "px";
});
document.addEventListener("pointerleave", hide);
const follow = async () => {
  const main = document.querySelector("main");
  if (!main.dataset.refresh) return;
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (answer.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = [...main.querySelectorAll("details")].map((each) => each.open);
      main.replaceWith(page.querySelector("main"));
      document.querySelectorAll("main details").forEach((each, i) => (each.open = open[i] || false));
    }
  } catch { /* the server has ended: what is shown stays */ }
  setTimeout(follow, 1000 * (document.querySelector("main").dataset.refresh || 0));
};
const seconds = document.querySelector("main").dataset.refresh;
if (seconds) setTimeout(follow, 1000 * seconds);
