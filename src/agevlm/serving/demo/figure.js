// Runs once per answer's place on the page (`element`); answers come and go inside of it.
const choose = (figure, token) => {
  const select = figure.querySelector("select");
  figure.dataset.token = token;
  for (const heat of figure.querySelectorAll(".heat"))
    heat.classList.toggle("seen", heat.dataset.token === token && heat.dataset.layer === select.value);
  for (const span of figure.querySelectorAll(".token"))
    span.classList.toggle("chosen", span.dataset.token === token);
  figure.querySelector(".peak").textContent = select.selectedOptions[0].dataset.peak;
};
const point = (event) => {
  const token = event.target.closest(".token");
  if (token) choose(token.closest("figure"), token.dataset.token);
};
element.addEventListener("pointerover", point);
element.addEventListener("focusin", point);
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
