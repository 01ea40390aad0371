'use strict';
// Curves, pictures that are browsed, and the map of embeddings. Text from the run is set as text, never as markup.
const DATA = JSON.parse(document.getElementById('page-data').textContent);
const NS = 'http://www.w3.org/2000/svg';
const COLORS = 8, DASHES = ['', '7 3', '2 3', '9 3 2 3'];

function svg(parent, name, attributes) {
  const e = document.createElementNS(NS, name);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  parent.appendChild(e);
  return e;
}
function html(parent, name, text, className) {
  const e = document.createElement(name);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  parent.appendChild(e);
  return e;
}
function shown(v, digits = 4) {
  if (v === null || v === undefined) return '–';
  const a = Math.abs(v);
  return a !== 0 && (a < 1e-3 || a >= 1e5) ? v.toExponential(digits - 2) : String(Number(v.toPrecision(digits)));
}
const color = i => `var(--c${i % COLORS})`;

// ---- charts
const LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 20, HEIGHT = 176;
const TOLD = 16;      // series whose values are written out
const many = DATA.runs.length > 1;

class Chart {
  constructor(place, data) {
    this.data = data;
    this.box = place;
    this.log = false;
    const head = html(place, 'header');
    html(head, 'span', data.title);
    this.button = html(head, 'button', 'log');
    this.button.type = 'button';
    this.button.setAttribute('aria-pressed', 'false');
    this.button.onclick = () => this.scale(!this.log);
    this.canLog = data.series.some(s => s.y.some(v => v > 0));
    this.button.hidden = !this.canLog;
    this.area = svg(place, 'svg', {role: 'img', tabindex: 0, 'aria-label': data.title});
    this.said = html(place, 'div', undefined, 'said');
    this.area.onpointermove = e => this.at(e);
    this.area.onpointerdown = e => this.at(e);
    this.area.onpointerleave = () => this.tell(null);
  }
  style(s) {
    const phase = DATA.phases.indexOf(s.phase);
    return many ? {c: color(s.run), d: DASHES[phase % DASHES.length]} : {c: color(phase), d: ''};
  }
  scale(log) {
    this.log = log && this.canLog;
    this.button.setAttribute('aria-pressed', String(this.log));
    this.draw();
  }
  draw() {
    const width = this.area.clientWidth || 320, t = this.log ? v => (v > 0 ? Math.log10(v) : null) : v => v;
    this.area.textContent = '';
    this.area.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (const s of this.data.series) for (let i = 0; i < s.x.length; i++) {
      const v = s.y[i] === null ? null : t(s.y[i]);
      x0 = Math.min(x0, s.x[i]); x1 = Math.max(x1, s.x[i]);
      if (v !== null) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); }
    }
    for (const k in this.data.levels) {
      const v = t(this.data.levels[k]);
      if (v !== null) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); }
    }
    if (!isFinite(y0)) { y0 = 0; y1 = 1; }
    if (y1 - y0 < 1e-12) { const d = Math.abs(y0) * .1 || 1; y0 -= d; y1 += d; }
    if (x1 === x0) x1 = x0 + 1;
    const X = v => LEFT + (v - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    const Y = v => TOP + (1 - (v - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    this.X = X; this.x0 = x0; this.x1 = x1; this.width = width;
    svg(this.area, 'path', {class: 'axis', d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${width - RIGHT}`});
    for (const f of [0, .5, 1]) {
      const v = y0 + f * (y1 - y0), x = x0 + f * (x1 - x0);
      svg(this.area, 'text', {x: LEFT - 4, y: Y(v) + 4, 'text-anchor': 'end'}).textContent = shown(this.log ? 10 ** v : v, 3);
      svg(this.area, 'text', {x: X(x), y: HEIGHT - 5, 'text-anchor': f === 0 ? 'start' : f === 1 ? 'end' : 'middle'})
        .textContent = String(Math.round(x));
    }
    for (const k in this.data.levels) {
      const v = t(this.data.levels[k]);
      if (v === null) continue;
      svg(this.area, 'line', {class: 'level', x1: LEFT, x2: width - RIGHT, y1: Y(v), y2: Y(v)});
      svg(this.area, 'text', {x: width - RIGHT, y: Y(v) < 24 ? Y(v) + 12 : Y(v) - 3, 'text-anchor': 'end'}).textContent = k;
    }
    for (const s of this.data.series) {
      let d = '', pen = false;
      for (let i = 0; i < s.x.length; i++) {
        const v = s.y[i] === null ? null : t(s.y[i]);
        if (v === null) { pen = false; continue; }
        d += `${pen ? 'L' : 'M'}${X(s.x[i]).toFixed(1)} ${Y(v).toFixed(1)}`;
        pen = true;
      }
      const look = this.style(s);
      if (d) svg(this.area, 'path', {class: 'series', d: d.includes('L') ? d : d + 'h.1', style: `stroke:${look.c}`,
        'stroke-dasharray': look.d, 'stroke-linecap': 'round', 'stroke-width': d.includes('L') ? 1.6 : 5});
    }
    this.cursor = svg(this.area, 'line', {class: 'cursor', y1: TOP, y2: HEIGHT - BOTTOM, visibility: 'hidden'});
    this.tell(null);
  }
  at(e) {
    const r = this.area.getBoundingClientRect();
    const px = (e.clientX - r.left) * this.width / r.width;
    this.tell(this.x0 + (px - LEFT) / (this.width - LEFT - RIGHT) * (this.x1 - this.x0));
  }
  tell(x) {      // null: the last values
    this.said.textContent = '';
    this.cursor.setAttribute('visibility', x === null ? 'hidden' : 'visible');
    let first = true;
    const told = this.data.series.slice(0, TOLD);
    for (const s of told) {
      let best = s.x.length - 1;
      if (x !== null) for (let i = 0; i < s.x.length; i++) if (Math.abs(s.x[i] - x) < Math.abs(s.x[best] - x)) best = i;
      if (x !== null && first) {
        this.cursor.setAttribute('x1', this.X(s.x[best])); this.cursor.setAttribute('x2', this.X(s.x[best]));
        html(this.said, 'span', `step ${s.x[best]}`); first = false;
      }
      const look = this.style(s), part = html(this.said, 'span');
      html(part, 'i', undefined, 'dot').style.background = look.c;
      part.append([many ? DATA.runs[s.run] : '', s.phase].filter(Boolean).join(' ') + ' ' + shown(s.y[best]));
    }
    const more = this.data.series.length - told.length;
    if (more) html(this.said, 'span', `and ${more} more`);
  }
}

const waiting = new Map(), made = [];
let logAll = false;
function begin(place) {
  if (!waiting.has(place)) return;
  const chart = new Chart(place, waiting.get(place));
  waiting.delete(place);
  made.push(chart);
  chart.scale(logAll);
}
const seen = new IntersectionObserver(
  entries => entries.forEach(e => { if (e.isIntersecting) begin(e.target); }), {rootMargin: '300px'});
window.addEventListener('beforeprint', () => [...waiting.keys()].forEach(begin));
for (const place of document.querySelectorAll('.chart')) {
  waiting.set(place, DATA.charts[Number(place.dataset.chart)]);
  seen.observe(place);
}
const all = document.getElementById('all-log');
if (all) all.onclick = () => {
  logAll = !logAll;
  all.setAttribute('aria-pressed', String(logAll));
  for (const chart of made) chart.scale(logAll);
};
let later = 0;
window.addEventListener('resize', () => {
  clearTimeout(later);
  later = setTimeout(() => made.forEach(c => c.draw()), 150);
});

// ---- pictures over time, and slices: a strip of frames of which one is shown
for (const box of document.querySelectorAll('.browser')) {
  const image = box.querySelector('img'), range = box.querySelector('input'), said = box.querySelector('output');
  const frames = Number(box.dataset.frames), zoom = Number(box.dataset.zoom || 1), canvas = document.createElement('canvas');
  image.after(canvas);
  image.hidden = true;
  const show = () => {
    const w = image.naturalWidth, h = image.naturalHeight / frames;
    if (canvas.width !== w) { canvas.width = w; canvas.height = h; canvas.style.width = `${w * zoom}px`; }
    canvas.getContext('2d').drawImage(image, 0, range.value * h, w, h, 0, 0, w, h);
    said.textContent = `${Number(range.value) + 1} of ${frames}`;
  };
  range.oninput = show;
  image.decode().then(show);
}
for (const box of document.querySelectorAll('.times')) {
  const images = box.querySelectorAll('img'), range = box.querySelector('input'), said = box.querySelector('output');
  const show = () => images.forEach((im, i) => {
    im.hidden = i !== Number(range.value);
    if (!im.hidden) said.textContent = im.alt;
  });
  range.oninput = show;
  show();
}

// ---- the map of embeddings
for (const box of document.querySelectorAll('.scatter')) {
  const data = DATA.maps[Number(box.dataset.map)], select = box.querySelector('select'), said = box.querySelector('.said');
  const area = svg(box, 'svg', {viewBox: '0 0 400 300', role: 'img', 'aria-label': 'principal components'});
  for (const name of Object.keys(data.labels)) html(select, 'option', name).value = name;
  const xs = data.points.map(p => p[0]), ys = data.points.map(p => p[1]);
  const low = Math.min, x0 = low(...xs), x1 = Math.max(...xs), y0 = low(...ys), y1 = Math.max(...ys);
  const dots = data.points.map((p, i) => {
    const x = 10 + (p[0] - x0) / (x1 - x0 || 1) * 380, y = 290 - (p[1] - y0) / (y1 - y0 || 1) * 280, r = 3.2;
    const kind = data.kinds.indexOf(data.kind[i]);
    const d = [`M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`, `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
      `M${x} ${y - r - 1}l${r + 1} ${2 * r}h${-2 * r - 2}z`][kind % 3];
    const dot = svg(area, 'path', {d, 'fill-opacity': .7});
    dot.onpointerenter = dot.onpointerdown = () => {
      said.textContent = `${data.kind[i]} ${data.names[i]}, ${select.value}: ${shown(data.labels[select.value][i])}`;
    };
    return dot;
  });
  const paint = () => dots.forEach((dot, i) => {
    const v = data.labels[select.value][i];
    dot.setAttribute('style', `fill:${v === null ? 'var(--dim)' : color(v > .5 ? 1 : 0)}`);
  });
  select.onchange = paint;
  paint();
}
document.documentElement.dataset.ready = 'yes';
