"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const plots = [];

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue("--" + name).trim();
    return { ink: value("ink"), muted: value("muted"), grid: value("grid"), line: value("line"), card: value("card") };
  };

  const layoutFor = (figure, colours) => {
    const layout = {
      "font.color": colours.ink, "font.size": 12, "font.family": getComputedStyle(document.body).fontFamily,
      "hoverlabel.bgcolor": colours.card, "hoverlabel.bordercolor": colours.line, "hoverlabel.font.color": colours.ink,
    };
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis + ".gridcolor"] = colours.grid;
      layout[axis + ".linecolor"] = colours.line;
      layout[axis + ".tickfont.color"] = colours.muted;
      layout[axis + ".title.font.color"] = colours.muted;
    }
    return layout;
  };

  const paint = (plot) => {
    const colours = theme();
    const inked = plot.data.flatMap((trace, index) => (trace.meta && trace.meta.ink ? [index] : []));
    const traces = inked.length ? { "line.color": colours.ink, "marker.color": colours.ink, "marker.line.color": colours.ink } : {};
    return Plotly.update(plot, traces, layoutFor(plot, colours), inked);
  };

  const draw = async (source) => {
    const figure = JSON.parse(source.textContent);
    const plot = document.getElementById(source.dataset.plot);
    // On a touch screen a drag must scroll the page.
    if (window.matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
    await Plotly.newPlot(plot, figure.data, figure.layout, config);
    await paint(plot);
    plot.dataset.group = source.dataset.group;
    plot.dataset.drawn = "true";
    plots.push(plot);
  };

  const toggle = (button) => {
    const { group, run } = button.dataset;
    const shown = button.getAttribute("aria-pressed") !== "true";
    document.querySelectorAll(".legend button").forEach((other) => {
      if (other.dataset.group === group && other.dataset.run === run) other.setAttribute("aria-pressed", String(shown));
    });
    plots.filter((plot) => plot.dataset.group === group).forEach((plot) => {
      const indices = plot.data.flatMap((trace, index) => (trace.meta && trace.meta.run === run ? [index] : []));
      if (indices.length) Plotly.restyle(plot, { visible: shown }, indices);
    });
  };

  document.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => toggle(button)));
  dark.addEventListener("change", () => plots.forEach(paint));
  Promise.all([...document.querySelectorAll("script[data-plot]")].map(draw)).then(() => {
    document.documentElement.dataset.drawn = "true";
  });
})();
