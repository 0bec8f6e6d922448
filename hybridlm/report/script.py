"""Reads values off the charts under the pointer. The page is whole without it."""

SCRIPT = """
'use strict';
const scaleOf = text => {
  const [kind, ...ends] = text.split(' ');
  const [low, high, start, end] = ends.map(Number);
  const f = kind === 'log' ? Math.log : x => x, g = kind === 'log' ? Math.exp : x => x;
  return pixel => g(f(low) + (pixel - start) / (end - start) * (f(high) - f(low)));
};
for (const figure of document.querySelectorAll('figure.chart')) {
  const svg = figure.querySelector('svg'), cursor = svg.querySelector('.cursor'), at = figure.querySelector('.at');
  const x = scaleOf(svg.dataset.x), y = scaleOf(svg.dataset.y);
  const values = [...figure.querySelectorAll('.value')];
  const lasts = values.map(value => value.textContent), atFirst = at.textContent, axis = atFirst.slice(3);
  const lines = [...svg.querySelectorAll('g[data-name]')].map(group =>
    [...group.querySelectorAll('polyline:not(.mean), circle.single:not(.mean)')].flatMap(part =>
      part.tagName === 'circle' ? [[+part.getAttribute('cx'), +part.getAttribute('cy')]]
        : part.getAttribute('points').split(' ').map(point => point.split(',').map(Number))));
  const every = lines.flat();
  const nearest = (points, pixel) =>
    points.reduce((best, point) => Math.abs(point[0] - pixel) < Math.abs(best[0] - pixel) ? point : best);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const place = nearest(every, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width)[0];
    cursor.setAttribute('x1', place);
    cursor.setAttribute('x2', place);
    cursor.style.visibility = 'visible';
    at.textContent = axis + ' ' + Math.round(x(place)).toLocaleString('en');
    lines.forEach((points, n) => {
      if (points.length) values[n].textContent = String(+y(nearest(points, place)[1]).toPrecision(3));
    });
  });
  svg.addEventListener('pointerleave', () => {
    cursor.style.visibility = 'hidden';
    at.textContent = atFirst;
    values.forEach((value, n) => { value.textContent = lasts[n]; });
  });
}
"""
