// The mathematics of drawing: noise, levels, samplers. Knows nothing of the page or of networks.
// The same as lightdiff's data/order.py, diffusion/schedules.py, objectives.py and samplers.py, number by number.

// --- noise: a function of (seed, purpose, item) -------------------------------------------------------------------

const K = primes(64).map((p) => fraction(Math.cbrt(p)));
const H = primes(8).map((p) => fraction(Math.sqrt(p)));

function primes(count) {
  const found = [];
  for (let n = 2; found.length < count; n++) if (found.every((p) => n % p)) found.push(n);
  return found;
}

function fraction(x) {
  return ((x - Math.floor(x)) * 2 ** 32) >>> 0;
}

/** SHA-256 of bytes, as eight 32-bit numbers (FIPS 180-4). crypto.subtle has it only on secure origins. */
export function sha256(bytes) {
  const length = bytes.length;
  const padded = new Uint8Array((((length + 8) >> 6) + 1) << 6);
  padded.set(bytes);
  padded[length] = 0x80;
  new DataView(padded.buffer).setUint32(padded.length - 4, length * 8);
  const view = new DataView(padded.buffer), h = Uint32Array.from(H), w = new Uint32Array(64);
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  for (let at = 0; at < padded.length; at += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getUint32(at + 4 * i);
    for (let i = 16; i < 64; i++) {
      const a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    let [a, b, c, d, e, f, g, hh] = h;
    for (let i = 0; i < 64; i++) {
      const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25), choice = (e & f) ^ (~e & g);
      const t1 = (hh + s1 + choice + K[i] + w[i]) | 0;
      const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22), majority = (a & b) ^ (a & c) ^ (b & c);
      [hh, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + s0 + majority) | 0];
    }
    [a, b, c, d, e, f, g, hh].forEach((x, i) => (h[i] += x));
  }
  return h;
}

/** The Mersenne Twister that torch draws from on a CPU (Matsumoto & Nishimura 1998). */
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** Standard normal numbers as torch.randn gives them for at least 16: by Box and Muller, in groups of 16. */
export function noise(count, seed, purpose, item) {
  const text = [seed, purpose, item].join("\x1f"), h = sha256(new TextEncoder().encode(text));
  const random = twister(((h[0] & 1) << 31) | (h[1] >>> 1)); // the low 32 bits of the first 64, halved
  const uniform = () => Math.fround((random() & 0xffffff) * 2 ** -24);
  const x = Float32Array.from({ length: count }, uniform);
  const fill = (first) => {
    for (let j = first; j < first + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - x[j])), theta = 2 * Math.PI * x[j + 8];
      x[j] = radius * Math.cos(theta);
      x[j + 8] = radius * Math.sin(theta);
    }
  };
  for (let i = 0; i < count - 15; i += 16) fill(i);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) x[i] = uniform();
    fill(count - 16);
  }
  return x;
}

/** What lies between two noises, on the arc between them (Shoemake 1985). */
export function slerp(a, b, share) {
  let dot = 0, aa = 0, bb = 0;
  a.forEach((x, i) => { dot += x * b[i]; aa += x * x; bb += b[i] * b[i]; });
  const angle = Math.acos(Math.max(-1, Math.min(1, dot / Math.sqrt(aa * bb))));
  if (angle < 1e-4) return a.map((x, i) => x + share * (b[i] - x));
  const [p, q] = [Math.sin((1 - share) * angle), Math.sin(share * angle)].map((s) => s / Math.sin(angle));
  return a.map((x, i) => p * x + q * b[i]);
}

// --- levels ---------------------------------------------------------------------------------------------------------

const CLEAN = { t: -1, alpha: 1, sigma: 0 };

/** The levels that sampling visits, from noisy to clean. `model` has alpha and sigma of all levels. */
export function levels(model, steps, spacing) {
  const { alpha, sigma, floor } = model;
  let usable = alpha.filter((a, i) => (a * a) / (a * a + sigma[i] * sigma[i]) >= floor).length;
  if (spacing === "karras") usable = Math.min(usable, alpha.filter((a) => a > 0).length);
  if (!(steps >= 1 && steps <= usable)) throw new Error(`between 1 and ${usable} steps, please`);
  const shares = Array.from({ length: steps }, (_, i) => (steps > 1 ? 1 - i / (steps - 1) : 1));
  if (spacing === "karras") {
    const ratio = alpha.slice(0, usable).map((a, i) => sigma[i] / a), logs = ratio.map(Math.log);
    const low = ratio[0] ** (1 / 7), high = ratio[usable - 1] ** (1 / 7);
    return [...shares.map((s) => between(model, interpolate(7 * Math.log(low + s * (high - low)), logs))), CLEAN];
  }
  let found;
  if (spacing === "trailing") {
    found = shares.map((_, i) => even(usable - (i * usable) / steps) - 1);
  } else {
    found = shares.map((s) => even((spacing === "quadratic" ? s * s : s) * (usable - 1)));
    for (let i = steps - 2; i >= 0; i--) found[i] = Math.max(found[i], found[i + 1] + 1);
  }
  return [...found.map((t) => ({ t, alpha: alpha[t], sigma: sigma[t] })), CLEAN];
}

/** To the nearest whole number, halves to the even one, as Python rounds. */
function even(x) {
  const below = Math.floor(x);
  return x - below === 0.5 ? below + (below % 2) : Math.round(x);
}

/** The position of a value in a rising table. */
function interpolate(value, table) {
  if (value <= table[0]) return 0;
  const above = table.findIndex((x) => x >= value);
  return above < 0 ? table.length - 1 : above - 1 + (value - table[above - 1]) / (table[above] - table[above - 1]);
}

function between({ alpha, sigma }, t) {
  const below = Math.min(Math.floor(t), alpha.length - 2), part = t - below;
  const [a0, a1, s0, s1] = [alpha[below], alpha[below + 1], sigma[below], sigma[below + 1]];
  const norm = Math.hypot(a0, s0) ** (1 - part) * Math.hypot(a1, s1) ** part;
  const ratio = part ? (s0 / a0) ** (1 - part) * (s1 / a1) ** part : s0 / a0;
  const a = norm / Math.hypot(1, ratio);
  return { t, alpha: a, sigma: ratio * a };
}

// --- from a prediction to x0 and eps --------------------------------------------------------------------------------

/** a x + b y, element by element. */
function mix(a, x, b, y) {
  return x.map((value, i) => a * value + b * y[i]);
}

function x0AndEps(objective, x, prediction, { alpha, sigma }) {
  const [a, b] = { eps: [0, 1], x0: [1, 0], v: [-sigma, alpha], flow: [-1, 1] }[objective];
  const d = alpha * b - sigma * a;
  return [mix(b / d, x, -sigma / d, prediction), mix(-a / d, x, alpha / d, prediction)];
}

/**
 * A denoiser: (x_t, level) -> [x0, eps].
 * @param predict (latents, t, labels, worse) -> predictions, all of several images; labels null where there are no
 *   classes; worse: those of the U-Net that guidance without a class leads away from
 * @param how label: null for no class; guidance; interval: shares of levels to guide at
 */
export function denoiser(model, predict, { label = null, guidance = 1, interval = [0, 1] }) {
  const [first, last] = interval.map((share) => share * model.alpha.length - 1);
  return async (x, level) => {
    const guided = guidance !== 1 && first <= level.t && level.t <= last;
    let prediction;
    if (!guided || label === null) {
      [prediction] = await predict([x], level.t, label === null ? null : [label]);
      if (guided && model.guide) {
        const [worse] = await predict([x], level.t, null, true);
        prediction = mix(guidance, prediction, 1 - guidance, worse);
      }
    } else {
      const [with_, without] = await predict([x, x], level.t, [label, model.classes.length]);
      prediction = mix(guidance, with_, 1 - guidance, without);
    }
    return x0AndEps(model.objective, x, prediction, level);
  };
}

// --- samplers: async generators of {x, x0, level}, one for each step; they return the clean latent ------------------

async function* ddim(denoise, levels, x, stepNoise, eta) {
  for (let i = 0; i + 1 < levels.length; i++) {
    const here = levels[i], there = levels[i + 1];
    const [x0, eps] = await denoise(x, here);
    yield { x, x0, level: here };
    const added = here.sigma ** 2 - ((here.alpha / there.alpha) * there.sigma) ** 2;
    const fresh = eta * (there.sigma / here.sigma) * Math.sqrt(Math.max(0, added));
    x = mix(there.alpha, x0, Math.sqrt(Math.max(0, there.sigma ** 2 - fresh ** 2)), eps);
    if (fresh > 0) x = mix(1, x, fresh, stepNoise(i));
  }
  return x;
}

async function* heun(denoise, levels, x) {
  for (let i = 0; i + 1 < levels.length; i++) {
    const here = levels[i], there = levels[i + 1], da = there.alpha - here.alpha, ds = there.sigma - here.sigma;
    const [x0, eps] = await denoise(x, here);
    yield { x, x0, level: here };
    let end = mix(1, x, 1, mix(da, x0, ds, eps));
    if (there.sigma > 0) {
      const [x0End, epsEnd] = await denoise(end, there);
      end = mix(1, x, 0.5, mix(da, mix(1, x0, 1, x0End), ds, mix(1, eps, 1, epsEnd)));
    }
    x = end;
  }
  return x;
}

function logSNR({ alpha, sigma }) {
  return alpha === 0 ? -Infinity : sigma === 0 ? Infinity : Math.log(alpha / sigma);
}

async function* dpmpp2m(denoise, levels, x) {
  let before = null;
  for (let i = 0; i + 1 < levels.length; i++) {
    const here = levels[i], there = levels[i + 1], width = logSNR(there) - logSNR(here);
    const [x0] = await denoise(x, here);
    yield { x, x0, level: here };
    let guess = x0;
    if (before && there.sigma > 0) {
      const share = width / (2 * before.width);
      guess = mix(1 + share, x0, -share, before.x0);
    }
    before = { x0, width };
    const kept = there.sigma / here.sigma;
    x = mix(kept, x, there.alpha - here.alpha * kept, guess);
  }
  return x;
}

export const SAMPLERS = {
  "dpm++2m": dpmpp2m,
  ddim: (denoise, levels, x, stepNoise) => ddim(denoise, levels, x, stepNoise, 0),
  ddpm: (denoise, levels, x, stepNoise) => ddim(denoise, levels, x, stepNoise, 1),
  heun,
};

/** The steps of an image: an async generator as above. `start` is its noise. */
export function sample(model, predict, how, start) {
  const visited = levels(model, how.steps, how.spacing), { alpha, sigma } = visited[0];
  const x = start.map((value) => value * Math.hypot(alpha, sigma)); // as if x0 were noise of unit variance, too
  const stepNoise = (step) => noise(start.length, how.seed, `step ${step}`, 0);
  return SAMPLERS[how.sampler](denoiser(model, predict, how), visited, x, stepNoise);
}
