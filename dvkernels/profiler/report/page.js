"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const symbols = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star", "pentagon"];
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let windows = {}; // of the timeline: what is shown, and all

  const color = (name) =>
    getComputedStyle(root).getPropertyValue("--" + name.replaceAll(" ", "-")).trim();

  function colored(trace) {
    const { color: name, symbol = 0, ...rest } = trace;
    const value = color(name);
    const marker = { color: value, symbol: symbols[symbol % symbols.length], size: 7 };
    return { ...rest, marker: { ...marker, line: { width: 0 } }, line: { color: value, width: 2 } };
  }

  function draw() {
    const ink = color("ink"), line = color("line"), isNarrow = innerWidth < 600;
    for (const [name, figure] of Object.entries(figures)) {
      const axis = { color: ink, gridcolor: line, linecolor: line };
      const layout = {
        font: { color: ink, size: isNarrow ? 11 : 13, family: getComputedStyle(document.body).fontFamily },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 8, r: 12, t: 8, b: 8 },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
        hoverlabel: { bgcolor: color("raised"), font: { color: ink }, bordercolor: line },
        dragmode: false,
        ...figure.layout,
        xaxis: { ...axis, nticks: isNarrow ? 5 : 10, ...figure.layout.xaxis },
        yaxis: { ...axis, nticks: 6, ...figure.layout.yaxis },
        yaxis2: { ...axis, ...figure.layout.yaxis2 },
      };
      if (name === "timeline" && windows.shown) layout.xaxis.range = windows.shown;
      Plotly.react("plot-" + name, figure.data.map(colored), layout, {
        displayModeBar: false, responsive: true, doubleClick: false,
      });
    }
  }

  function setTheme(isDark) {
    root.dataset.theme = isDark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(isDark));
    draw();
  }

  function moveTimeline(control) {
    const [begin, end] = windows.shown, width = end - begin;
    if (control.dataset.zoom === "0") {
      windows.shown = [...windows.all];
    } else if (control.dataset.zoom) {
      const half = (width * Number(control.dataset.zoom)) / 2, middle = (begin + end) / 2;
      windows.shown = [middle - half, middle + half];
    } else {
      const shift = width * Number(control.dataset.move);
      windows.shown = [begin + shift, end + shift];
    }
    Plotly.relayout("plot-timeline", { "xaxis.range": windows.shown });
  }

  function sortBy(header) {
    const table = header.closest("table"), body = table.tBodies[0];
    const column = [...header.parentElement.children].indexOf(header);
    const isUp = header.getAttribute("aria-sort") !== "ascending";
    for (const each of header.parentElement.children) each.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const compare = (one, other) => {
      const [a, b] = [one, other].map((row) => row.children[column]);
      return "value" in a.dataset
        ? Number(a.dataset.value) - Number(b.dataset.value)
        : a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    };
    const rows = [...body.rows].sort(compare);
    body.append(...(isUp ? rows : rows.reverse()));
  }

  button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  for (const each of document.querySelectorAll("thead th"))
    each.firstElementChild.addEventListener("click", () => sortBy(each));
  if (figures.timeline) {
    windows = { shown: [...figures.timeline.layout.xaxis.range] };
    windows.all = [...windows.shown];
    for (const each of document.querySelectorAll(".buttons button"))
      each.addEventListener("click", () => moveTimeline(each));
  }
  setTheme(prefersDark.matches);
  if (figures.timeline)
    document.getElementById("plot-timeline").on("plotly_relayout", (change) => {
      if ("xaxis.range[0]" in change)
        windows.shown = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    });
})();
