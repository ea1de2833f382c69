// Renders the formulas that pymdownx.arithmatex has marked: \(...\) in a line, \[...\] on its own.
// A formula that KaTeX does not understand stays as its source, in red.
for (const element of document.querySelectorAll(".arithmatex")) {
  const source = element.textContent.trim();
  katex.render(source.slice(2, -2), element, {
    displayMode: source.startsWith("\\["),
    throwOnError: false,
  });
}
