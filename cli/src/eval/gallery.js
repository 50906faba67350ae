'use strict';
(function () {
  const main = document.querySelector('main');
  const cards = Array.from(main.children);
  const search = document.getElementById('search');
  const category = document.getElementById('category');
  const order = document.getElementById('order');
  const count = document.getElementById('count');
  const text = new Map(cards.map(card => [card, card.textContent.toLowerCase()]));
  // Cards without a score come last, whichever way they are sorted.
  const score = (card, missing) => card.dataset.score === '' ? missing : Number(card.dataset.score);
  const orders = {
    at: (a, b) => a.dataset.at - b.dataset.at,
    low: (a, b) => score(a, Infinity) - score(b, Infinity) || a.dataset.at - b.dataset.at,
    high: (a, b) => score(b, -Infinity) - score(a, -Infinity) || a.dataset.at - b.dataset.at,
  };
  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const fits = (!category.value || card.dataset.category === category.value)
        && words.every(word => text.get(card).includes(word));
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + ' of ' + cards.length;
  }
  function sort() {
    main.append(...cards.slice().sort(orders[order.value]));
  }
  for (const image of document.images) {
    const mark = () => image.classList.toggle('small', image.naturalWidth < 128);
    if (image.complete) mark(); else image.addEventListener('load', mark);
  }
  search.addEventListener('input', show);
  category.addEventListener('change', show);
  order.addEventListener('change', sort);
  show();
})();
