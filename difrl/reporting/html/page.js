"use strict";
(() => {
  const root = document.documentElement, tip = document.getElementById("tip");
  root.classList.add("js");
  const all = (query, from = document) => [...from.querySelectorAll(query)];

  // Horizontal axis: a figure that lacks the chosen one keeps showing steps.
  const setAxis = (axis) => {
    document.body.dataset.axis = axis;
    all("[data-set-axis]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.setAxis === axis));
    all(".chart[data-axes]").forEach((figure) => {
      const has = figure.dataset.axes.split(" ").includes(axis);
      all(".by-step", figure).forEach((by) => by.classList.toggle("only", !has));
    });
  };
  all("[data-set-axis]").forEach((b) => b.addEventListener("click", () => setAxis(b.dataset.setAxis)));

  const place = (x, y) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
    tip.style.left = Math.max(8, Math.min(left, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(8, Math.min(y + 16, innerHeight - box.height - 8)) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const short = (v) => {
    const size = Math.abs(v);
    if (size === 0) return "0";
    if (size >= 1e4) return v.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size < 1e-3) return v.toExponential(1);
    return String(+v.toPrecision(4));
  };

  // Definitions: on hover, on focus, and on a tap.
  all("[data-tip]").forEach((item) => {
    const show = () => {
      if (!item.dataset.tip) return;
      tip.textContent = item.dataset.tip;
      const box = item.getBoundingClientRect();
      place(box.left, box.bottom - 10);
    };
    item.addEventListener("pointerenter", show);
    item.addEventListener("focus", show);
    item.addEventListener("pointerleave", hide);
    item.addEventListener("blur", hide);
  });

  // Values under the pointer: the nearest known x over all lines of a chart.
  all(".plot").forEach((svg) => {
    const chart = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor");
    const [low, high, start, end] = chart.x;
    const toX = (v) => start + ((v - low) / (high - low)) * (end - start);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const at = ((event.clientX - box.left) / box.width) * view.width;
      let best = null;
      chart.lines.forEach((line) => line.x.forEach((x, i) => {
        if (x === null || line.y[i] === null) return;
        const gap = Math.abs(toX(x) - at);
        if (best === null || gap < best.gap) best = { gap, x };
      }));
      if (best === null) return hide();
      cursor.setAttribute("d", `M${toX(best.x)} ${chart.top}V${chart.bottom}`);
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = short(best.x);
      tip.append(head);
      chart.lines.forEach((line) => {
        const i = line.x.indexOf(best.x);
        if (i < 0 || line.y[i] === null) return;
        const row = document.createElement("div"), dot = document.createElement("i");
        dot.className = "c" + line.colour;
        const error = line.error && line.error[i] !== null ? " ± " + short(line.error[i]) : "";
        row.append(dot, `${line.label} ${short(line.y[i])}${error}`);
        tip.append(row);
      });
      place(event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("d", ""); hide(); });
  });

  // The film of samples: slider, play, and a look back at the first frame while a button is held.
  all(".film").forEach((film) => {
    const frames = all(".frame", film), slider = film.querySelector("input");
    const show = (index) => frames.forEach((frame, i) => frame.classList.toggle("now", i === index));
    if (!slider) return show(0);
    const play = film.querySelector(".play"), first = film.querySelector(".first");
    let timer = 0;
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; play.setAttribute("aria-label", "play"); };
    const current = () => show(+slider.value);
    slider.addEventListener("input", () => { stop(); current(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (+slider.value === frames.length - 1) slider.value = 0;
      current();
      play.textContent = "❚❚";
      play.setAttribute("aria-label", "pause");
      timer = setInterval(() => {
        slider.value = +slider.value + 1;
        current();
        if (+slider.value === frames.length - 1) stop();
      }, 700);
    });
    const back = () => { stop(); show(0); };
    first.addEventListener("pointerdown", back);
    first.addEventListener("keydown", (event) => { if (event.key === " " || event.key === "Enter") back(); });
    ["pointerup", "pointerleave", "pointercancel", "keyup", "blur"].forEach((kind) => first.addEventListener(kind, current));
    current();
  });

  // A click shows a sheet at its own size, and fits it again.
  all(".sheet img").forEach((image) => image.addEventListener("click", () => image.closest(".sheet").classList.toggle("full")));

  // Paper shows everything; a link to a folded run opens it.
  let opened = [];
  addEventListener("beforeprint", () => { opened = all("details:not([open])"); opened.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => opened.forEach((d) => { d.open = false; }));
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", unfold);
  unfold();
})();
