"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  const sides = read("sides");
  const selects = { left: byId("left"), right: byId("right") };
  const buttons = [...byId("thumbnails").querySelectorAll("button")];
  const stage = byId("stage");
  const viewport = byId("viewport");
  const split = byId("split");
  const zoom = byId("zoom");
  let image = null;

  function moveDivide() {
    stage.style.setProperty("--split", `${split.value}%`);
  }

  function layOut() {
    const { width, height } = image;
    const section = viewport.closest("section");
    const fit = zoom.value === "fit";
    const shown = fit
      ? Math.min(section.clientWidth, Math.max(width, 480), (0.8 * window.innerHeight * width) / height)
      : width * Number(zoom.value);
    stage.style.width = `${shown}px`;
    stage.style.height = `${(shown * height) / width}px`;
    stage.classList.toggle("enlarged", shown > width * image.scale);
    section.style.setProperty("--shown", `${Math.max(shown, 240)}px`);
  }

  function showSide(side) {
    const index = Number(selects[side].value);
    const picture = byId(`picture-${side}`);
    const uri = image.pictures[index];
    const label = sides.labels[index];
    picture.hidden = uri === null;
    if (uri === null) {
      picture.removeAttribute("src");
    } else {
      picture.src = uri;
    }
    picture.alt = `${image.name}, ${label}`;
    byId(`tag-${side}`).textContent = uri === null ? `${label}: ${image.missing[index]}` : label;
    byId(`name-${side}`).textContent = label;
  }

  function cell(kind, text) {
    const element = document.createElement(kind);
    element.textContent = text;
    return element;
  }

  function showDetails() {
    const [left, right] = [selects.left, selects.right].map((select) => image.values[Number(select.value)]);
    const rows = image.rows.map((title, row) => {
      const line = document.createElement("tr");
      const heading = cell("th", title);
      heading.scope = "row";
      line.append(heading, cell("td", left ? left[row] : "-"), cell("td", right ? right[row] : "-"));
      return line;
    });
    byId("details").replaceChildren(...rows);
    const size = `${image.width} × ${image.height}`;
    const scale = image.scale < 1 ? `, shown at ${Math.round(100 * image.scale)} %` : "";
    byId("image-name").textContent = `${image.name} (${size}${scale})`;
  }

  function show() {
    showSide("left");
    showSide("right");
    showDetails();
  }

  function choose(index) {
    image = read(`image-${index}`);
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
    layOut();
    show();
  }

  function follow(event) {
    const box = stage.getBoundingClientRect();
    split.value = (100 * (event.clientX - box.left)) / box.width;
    moveDivide();
  }

  for (const [side, select] of Object.entries(selects)) {
    sides.labels.forEach((label, index) => select.add(new Option(label, index)));
    select.value = sides[side];
    select.addEventListener("change", show);
  }
  byId("swap").addEventListener("click", () => {
    [selects.left.value, selects.right.value] = [selects.right.value, selects.left.value];
    show();
  });
  split.addEventListener("input", moveDivide);
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) {
      follow(event);
    }
  });
  zoom.addEventListener("change", layOut);
  window.addEventListener("resize", layOut);
  buttons.forEach((button, index) => button.addEventListener("click", () => choose(index)));
  moveDivide();
  choose(0);
})();
