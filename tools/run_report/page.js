const spaced = "http://www.w3.org/2000/svg";
const plain = value => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2)
  : value.toLocaleString("en", { maximumSignificantDigits: 5 });
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), [low, high, start, length] = chart.x;
  const cursor = document.createElementNS(spaced, "path"), tip = document.createElement("div");
  cursor.setAttribute("class", "cursor"); tip.className = "tip"; tip.hidden = true;
  svg.append(cursor); svg.parentElement.append(tip);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), across = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (across - start) / length * (high - low);
    const nearest = points => points.reduce((best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
    const rows = chart.lines.map(([name, style, points]) => [name, style, nearest(points)]);
    const step = rows.map(row => row[2][0]).reduce((best, x) => Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best);
    const place = start + (step - low) / (high - low) * length;
    cursor.setAttribute("d", `M${place} 8V${svg.viewBox.baseVal.height - 26}`);
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    for (const [name, style, point] of rows) {
      const line = document.createElement("div"), key = document.createElement("i");
      key.className = `key ${style}`;
      line.append(key, `${name} ${plain(point[1])}` + (point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`));
      tip.append(line);
    }
    tip.hidden = false;
    const outer = svg.parentElement.getBoundingClientRect();
    const x = box.left - outer.left + place / svg.viewBox.baseVal.width * box.width;
    tip.style.left = `${x > outer.width / 2 ? Math.max(0, x - tip.offsetWidth - 12) : x + 12}px`;
    tip.style.top = `${box.top - outer.top + 8}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.removeAttribute("d"); });
}
const dialog = document.createElement("dialog"), large = document.createElement("img"), words = document.createElement("p");
dialog.append(large, words); document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
for (const picture of document.querySelectorAll("img.zoom")) picture.addEventListener("click", () => {
  large.src = picture.src; large.alt = picture.alt; words.textContent = picture.title; dialog.showModal();
});
document.documentElement.dataset.ready = "yes";
