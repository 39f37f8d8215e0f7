// Texts of the plots that lie on each other or are cut off, each as a sentence. Two numbers of one colour bar or axis too.
const found = [];
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector(".main-svg");
  if (!svg || !plot.getBoundingClientRect().width) continue;
  const frame = plot.getBoundingClientRect(), where = plot.closest("figure").querySelector("h3").textContent;
  const texts = [...plot.querySelectorAll("text")].filter(text => text.textContent.trim() && !text.closest(".hoverlayer, .g-gtitle") && getComputedStyle(text).opacity !== "0");
  const boxes = texts.map(text => ({name: text.textContent, box: text.getBoundingClientRect()})).filter(({box}) => box.width && box.height);
  boxes.forEach(({name, box}, i) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.push(`${where}: "${name}" is cut off`);
    for (const other of boxes.slice(i + 1)) {
      const wide = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
      const high = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
      // A line of text has some room above and below its letters.
      if (wide > 0.5 && high > 0.25 * Math.min(box.height, other.box.height)) found.push(`${where}: "${name}" lies on "${other.name}"`);
    }
  });
}
return found;
