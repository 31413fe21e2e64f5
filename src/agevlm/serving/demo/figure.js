// Runs once per answer's place on the page (`element`); answers come and go inside of it.
const choose = (figure, token) => {
  const select = figure.querySelector("select");
  figure.dataset.token = token;
  for (const heat of figure.querySelectorAll(".heat")) {
    const seen = heat.dataset.token === token && heat.dataset.layer === select.value;
    heat.classList.toggle("seen", seen);
    if (seen) figure.querySelector(".peak").textContent = heat.dataset.peak;
  }
  for (const span of figure.querySelectorAll(".token"))
    span.classList.toggle("chosen", span.dataset.token === token);
};
const point = (event) => {
  const token = event.target.closest(".token");
  if (token) choose(token.closest("figure"), token.dataset.token);
};
// The pictures beside each other under the chosen maps, and below them what is shown and its scale.
const draw = (figure) => {
  const side = 640, line = 24, gap = 10;
  const stages = [...figure.querySelectorAll(".stage")];
  const pictures = stages.map((stage) => stage.querySelector(".picture"));
  const widths = pictures.map((picture) => Math.max(1, Math.round((side * picture.naturalWidth) / picture.naturalHeight)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(420, widths.reduce((sum, width) => sum + width + gap, -gap));
  canvas.height = side + 3 * line + gap;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  let left = 0;
  stages.forEach((stage, index) => {
    for (const image of [pictures[index], ...stage.querySelectorAll(".heat.seen")])
      pen.drawImage(image, left, 0, widths[index], side);
    left += widths[index] + gap;
  });
  pen.fillStyle = "black";
  pen.font = "15px sans-serif";
  const words = (selector) => figure.querySelector(selector).textContent;
  const answer = [...figure.querySelectorAll(".tokens .token")].map((token) => token.textContent).join("").trim();
  pen.fillText(`${words("figcaption")}: ${words(".asked .token")} ${answer}`, 0, side + line, canvas.width);
  const layer = figure.querySelector("select").selectedOptions[0].textContent;
  pen.fillText(`look of “${words(".token.chosen").trim()}”, layer ${layer}`, 0, side + 2 * line, canvas.width);
  pen.fillText("0", 0, side + 3 * line);
  pen.drawImage(figure.querySelector(".colors"), 14, side + 3 * line - 12, 140, 13);
  pen.fillText(words(".scale").replace("0", "").trim(), 162, side + 3 * line);
  return canvas;
};
const save = (figure) => {
  const link = document.createElement("a");
  link.download = `attention-${figure.querySelector("figcaption").textContent}.png`;
  link.href = draw(figure).toDataURL("image/png");
  link.click();
};
element.addEventListener("pointerover", point);
element.addEventListener("focusin", point);
element.addEventListener("click", (event) => {
  point(event);
  if (event.target.closest(".save")) save(event.target.closest("figure"));
});
element.addEventListener("change", (event) => {
  const figure = event.target.closest("figure");
  choose(figure, figure.dataset.token);
});
// A new answer shows the question's look.
const begin = () => {
  for (const figure of element.querySelectorAll("figure[data-done]:not([data-token])")) choose(figure, "question");
};
new MutationObserver(begin).observe(element, { childList: true, subtree: true });
begin();
