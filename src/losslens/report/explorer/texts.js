// Page elements, and numbers as text.
const $ = id => document.getElementById(`x-${id}`);
const element = (name, text = "", attributes = {}) => {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

// Escapes text for plotly, which interprets some markup.
const safe = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const signed = text => text.replace("-", "−");
const fixed = (value, digits) => Number.isFinite(value) ? signed(value.toFixed(digits)).replace(/^−(?=[0.]+$)/, "") : "–";
const precise = (value, digits = 4) => Number.isFinite(value) ? signed(value === 0 ? "0" : Number(value.toPrecision(digits)).toString()) : "–";
// A CSV cell: ASCII minus signs, and empty where the value is unknown.
const cell = text => text === "–" ? "" : /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text.replace(/^−(?=[\d.]+$)/, "-");
const csv = ({heading, body}) => [heading, ...body].map(row => `${row.map(cell).join(",")}\r\n`).join("");
const capital = text => text[0].toUpperCase() + text.slice(1);
