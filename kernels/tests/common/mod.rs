//! What the tests share: tensors in any layout, calls of every mode, and the yardstick they are held to.
#![allow(dead_code)] // Each test file uses its part.

use ditfastattn_kernels::*;
use half::{bf16, f16};

fn convert<T: Element, U: Element>(data: &[T]) -> Vec<U> {
    data.iter().map(|x| U::from_f32(x.to_f32())).collect()
}

fn round_to_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Whether products in bfloat16 can be tested here; says so where they cannot.
pub fn bfloat16_products() -> bool {
    let there = Products::Bfloat16.available();
    if !there {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("a test");
        println!("skipped: {name} with products in bfloat16, which need AVX-512 BF16");
    }
    there
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Bhsd,
    Bshd,
    Bhds,
    /// Nothing is 1 apart: every dimension has a gap after it.
    Gaps,
}

pub const LAYOUTS: [Layout; 4] = [Layout::Bhsd, Layout::Bshd, Layout::Bhds, Layout::Gaps];

impl Layout {
    pub fn strides(self, [_, heads, tokens, channels]: [usize; 4]) -> Strides {
        match self {
            Layout::Bhsd => Strides::bhsd(heads, tokens, channels),
            Layout::Bshd => Strides::bshd(heads, tokens, channels),
            Layout::Bhds => Strides::bhds(heads, tokens, channels),
            Layout::Gaps => {
                let token = (2 * channels + 3) as isize;
                let head = token * tokens as isize + 5;
                Strides {
                    batch: head * heads as isize + 7,
                    head,
                    token,
                    channel: 2,
                }
            }
        }
    }
}

/// A tensor of `dims` (batch, heads, tokens, channels) in some layout.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    pub dims: [usize; 4],
    pub strides: Strides,
    pub data: Vec<T>,
}

impl<T: Element> Tensor<T> {
    pub fn new(dims: [usize; 4], layout: Layout, mut value: impl FnMut() -> f32) -> Self {
        let strides = layout.strides(dims);
        let mut t = Tensor {
            dims,
            strides,
            data: Vec::new(),
        };
        let len = if dims.contains(&0) {
            0
        } else {
            t.at(dims.map(|n| n - 1)) + 1
        };
        t.data = vec![T::from_f32(0.0); len];
        t.for_each(|t, at| t.data[at] = T::from_f32(value()));
        t
    }

    pub fn at(&self, [b, h, n, c]: [usize; 4]) -> usize {
        let s = self.strides;
        b * s.batch as usize + h * s.head as usize + n * s.token as usize + c * s.channel as usize
    }

    fn for_each(&mut self, mut f: impl FnMut(&mut Self, usize)) {
        let [b, h, n, c] = self.dims;
        for b in 0..b {
            for h in 0..h {
                for n in 0..n {
                    for c in 0..c {
                        let at = self.at([b, h, n, c]);
                        f(self, at);
                    }
                }
            }
        }
    }

    /// The values in the order (batch, head, token, channel).
    pub fn values(&self) -> Vec<f32> {
        let mut values = Vec::new();
        self.clone()
            .for_each(|t, at| values.push(t.data[at].to_f32()));
        values
    }

    /// The same numbers, rounded to another type.
    pub fn convert<U: Element>(&self) -> Tensor<U> {
        Tensor {
            dims: self.dims,
            strides: self.strides,
            data: convert(&self.data),
        }
    }

    pub fn input(&self) -> Input<'_> {
        Input::from_slice(&self.data, self.strides)
    }

    pub fn output(&mut self) -> Output<'_> {
        Output::from_slice(&mut self.data, self.strides)
    }
}

/// Numbers in −2..2, from a seed.
pub fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    move || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 22) as f32 - 2.0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Full,
    Capture,
    Window,
    WindowResidual,
}

pub const KINDS: [Kind; 4] = [
    Kind::Full,
    Kind::Capture,
    Kind::Window,
    Kind::WindowResidual,
];

/// What a test's mask holds.
#[derive(Clone, Debug)]
pub enum MaskData<T> {
    Boolean(Vec<u8>),
    Additive(Vec<T>),
}

/// A mask of `[batch, heads, q_tokens, kv_tokens]`, some of which are repeated.
#[derive(Clone, Debug)]
pub struct TestMask<T> {
    pub data: MaskData<T>,
    pub strides: MaskStrides,
    pub guarded: bool,
}

impl<T: Element> TestMask<T> {
    /// `dims` are 1 where the mask is repeated; elements are `gap` apart. `value` gives what is added, −∞ to hide;
    /// in a boolean mask all that is not −∞ shows.
    pub fn new(
        dims: [usize; 4],
        gap: usize,
        boolean: bool,
        mut value: impl FnMut() -> f32,
    ) -> Self {
        let mut stride = gap;
        let mut strides = [0; 4];
        for axis in (0..4).rev() {
            if dims[axis] > 1 {
                strides[axis] = stride as isize;
            }
            stride *= dims[axis];
        }
        let values: Vec<f32> = (0..stride)
            .map(|i| if i % gap == 0 { value() } else { f32::NAN })
            .collect();
        let data = if boolean {
            let byte = |x: &f32| u8::from(*x != f32::NEG_INFINITY);
            MaskData::Boolean(values.iter().map(byte).collect())
        } else {
            MaskData::Additive(values.iter().map(|x| T::from_f32(*x)).collect())
        };
        let [batch, head, query, key] = strides;
        TestMask {
            data,
            strides: MaskStrides {
                batch,
                head,
                query,
                key,
            },
            guarded: false,
        }
    }

    /// The same mask, rounded to another type.
    pub fn convert<U: Element>(&self) -> TestMask<U> {
        TestMask {
            data: match &self.data {
                MaskData::Boolean(data) => MaskData::Boolean(data.clone()),
                MaskData::Additive(data) => MaskData::Additive(convert(data)),
            },
            strides: self.strides,
            guarded: self.guarded,
        }
    }

    pub fn mask(&self) -> Mask<'_> {
        match &self.data {
            MaskData::Boolean(data) => Mask::boolean(data, self.strides),
            MaskData::Additive(data) => Mask::additive(data, self.strides).guarded(self.guarded),
        }
    }

    /// What is added to a score; −∞ hides.
    fn value(&self, [b, h, i, j]: [usize; 4]) -> f32 {
        let s = self.strides;
        let at =
            b as isize * s.batch + h as isize * s.head + i as isize * s.query + j as isize * s.key;
        match &self.data {
            MaskData::Additive(data) => data[at as usize].to_f32(),
            MaskData::Boolean(data) if data[at as usize] == 0 => f32::NEG_INFINITY,
            MaskData::Boolean(_) => 0.0,
        }
    }
}

/// One call and the tensors it is about.
#[derive(Clone, Debug)]
pub struct Problem<T> {
    pub kind: Kind,
    pub shape: Shape,
    pub scale: f32,
    pub band: Band,
    pub products: Products,
    pub q: Tensor<T>,
    pub k: Tensor<T>,
    pub v: Tensor<T>,
    pub mask: Option<TestMask<T>>,
    pub out: Tensor<T>,
    pub residual: Tensor<T>,
}

impl<T: Element> Problem<T> {
    pub fn new(kind: Kind, shape: Shape, band: Band, layouts: [Layout; 4], seed: u32) -> Self {
        let s = shape;
        let mut x = noise(seed);
        let o = [s.batch, s.heads, s.q_tokens, s.v_dim];
        Problem {
            kind,
            shape,
            scale: 1.0 / (s.head_dim.max(1) as f32).sqrt(),
            band,
            products: Products::Float32,
            q: Tensor::new(
                [s.batch, s.heads, s.q_tokens, s.head_dim],
                layouts[0],
                &mut x,
            ),
            k: Tensor::new(
                [s.batch, s.kv_heads, s.kv_tokens, s.head_dim],
                layouts[1],
                &mut x,
            ),
            v: Tensor::new(
                [s.batch, s.kv_heads, s.kv_tokens, s.v_dim],
                layouts[2],
                &mut x,
            ),
            mask: None,
            out: Tensor::new(o, layouts[3], || -77.0),
            residual: Tensor::new(o, layouts[3], &mut x),
        }
    }

    /// The same problem, rounded to another type, with products in bfloat16.
    pub fn in_bfloat16<U: Element>(&self) -> Problem<U> {
        Problem {
            kind: self.kind,
            shape: self.shape,
            scale: self.scale,
            band: self.band,
            products: Products::Bfloat16,
            q: self.q.convert(),
            k: self.k.convert(),
            v: self.v.convert(),
            mask: self.mask.as_ref().map(TestMask::convert),
            out: self.out.convert(),
            residual: self.residual.convert(),
        }
    }

    /// Lends the problem as a call.
    pub fn call<R>(&mut self, f: impl FnOnce(&Attention<'_>) -> R) -> R {
        let band = self.band;
        f(&Attention {
            shape: self.shape,
            scale: self.scale,
            q: self.q.input(),
            k: self.k.input(),
            v: self.v.input(),
            mask: self.mask.as_ref().map(TestMask::mask),
            out: self.out.output(),
            mode: match self.kind {
                Kind::Full => Mode::Full,
                Kind::Capture => Mode::FullCapture {
                    band,
                    residual: self.residual.output(),
                },
                Kind::Window => Mode::Window {
                    band,
                    residual: None,
                },
                Kind::WindowResidual => Mode::Window {
                    band,
                    residual: Some(self.residual.input()),
                },
            },
        })
    }

    /// Output and, in captures, residual, in the order (batch, head, token, channel).
    pub fn run(&mut self, isa: Isa, pool: &dyn Parallel) -> (Vec<f32>, Option<Vec<f32>>) {
        let products = self.products;
        self.call(|a| attention_at(a, pool, isa, products))
            .expect("a valid call");
        let residual = (self.kind == Kind::Capture).then(|| self.residual.values());
        (self.out.values(), residual)
    }

    pub fn oracle(&mut self) -> oracle::Answer {
        self.call(oracle::attention).expect("a valid call")
    }

    /// The definition in float32, rounded to T at the end: what anybody would write first. With products in bfloat16 it
    /// rounds what it multiplies: inputs and probabilities, but not scores.
    pub fn naive(&self) -> (Vec<f32>, Option<Vec<f32>>) {
        let zero = |m: &TestMask<T>| m.guarded || matches!(m.data, MaskData::Boolean(_));
        let o = self.naive_over(self.mask.as_ref().is_none_or(zero), |_, _| true);
        let w = self.naive_over(true, |i, j| self.band.sees(i, j, self.shape.kv_tokens));
        let round = |x: Vec<f32>| x.into_iter().map(|x| T::from_f32(x).to_f32()).collect();
        let pairs = |x: &[f32], y: &[f32], f: fn(f32, f32) -> f32| {
            x.iter().zip(y).map(|(x, y)| f(*x, *y)).collect()
        };
        match self.kind {
            Kind::Full => (round(o), None),
            Kind::Capture => {
                let r = pairs(&o, &w, |o, w| o - w);
                (round(o), Some(round(r)))
            }
            Kind::Window => (round(w), None),
            Kind::WindowResidual => (
                round(pairs(&w, &self.residual.values(), |w, r| w + r)),
                None,
            ),
        }
    }

    fn naive_over(&self, zero: bool, sees: impl Fn(usize, usize) -> bool) -> Vec<f32> {
        let s = self.shape;
        let rounds = self.products == Products::Bfloat16;
        let round = |x: f32| if rounds { round_to_bf16(x) } else { x };
        let [q, k, v] = [&self.q, &self.k, &self.v]
            .map(|t| t.values().into_iter().map(round).collect::<Vec<_>>());
        let mut out = Vec::new();
        for row in 0..s.batch * s.heads * s.q_tokens {
            let (plane, i) = (row / s.q_tokens, row % s.q_tokens);
            let kv = plane / s.heads * s.kv_heads + plane % s.heads / (s.heads / s.kv_heads);
            let mask = |j: usize| match &self.mask {
                Some(mask) => mask.value([plane / s.heads, plane % s.heads, i, j]),
                None => 0.0,
            };
            let keys: Vec<usize> = (0..s.kv_tokens)
                .filter(|&j| sees(i, j) && mask(j) != f32::NEG_INFINITY)
                .collect();
            let scores: Vec<f32> = keys
                .iter()
                .map(|j| {
                    let k = &k[(kv * s.kv_tokens + j) * s.head_dim..][..s.head_dim];
                    let q = &q[row * s.head_dim..][..s.head_dim];
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>() * self.scale + mask(*j)
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let p: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
            let mut sum: f32 = p.iter().sum();
            let p: Vec<f32> = if rounds {
                // What a softmax in bfloat16 hands on.
                let p = p.iter().map(|p| round(p / sum)).collect();
                sum = 1.0;
                p
            } else {
                p
            };
            for c in 0..s.v_dim {
                let dot: f32 = keys
                    .iter()
                    .zip(&p)
                    .map(|(j, p)| p * v[(kv * s.kv_tokens + j) * s.v_dim + c])
                    .sum();
                out.push(if keys.is_empty() && zero {
                    0.0
                } else {
                    dot / sum
                });
            }
        }
        out
    }
}

/// Largest and mean distance to the truth.
pub fn errors(got: &[f32], want: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let each = || got.iter().zip(want).map(|(x, y)| (f64::from(*x) - y).abs());
    let max = each().fold(0.0, |a, b| {
        if b.is_nan() {
            f64::INFINITY
        } else {
            f64::max(a, b)
        }
    });
    (max, each().sum::<f64>() / got.len().max(1) as f64)
}

/// A few of these are allowed where the naive implementation is lucky: the distance between two numbers near 1, of
/// float16 half of it, and of float16 with products in bfloat16 half of the latter's.
fn step(dtype: DType, products: Products) -> f64 {
    2f64.powi(match (dtype, products) {
        (DType::F32, _) => -23,
        (DType::F16, Products::Float32) => -11,
        (DType::F16, Products::Bfloat16) => -9,
        (DType::BF16, _) => -8,
    })
}

/// The rule of flash attention's tests: at most twice the error of the naive implementation in the same dtype, plus
/// a few roundings of a number near 1 where the naive one is lucky.
pub fn assert_close<T: Element>(got: &[f32], naive: &[f32], want: &[f64], what: &str) {
    assert_within(step(T::DTYPE, Products::Float32), got, naive, want, what);
}

fn assert_within(step: f64, got: &[f32], naive: &[f32], want: &[f64], what: &str) {
    let ((max, mean), (naive_max, naive_mean)) = (errors(got, want), errors(naive, want));
    assert!(
        max <= 2.0 * naive_max + 4.0 * step && mean <= 2.0 * naive_mean + step,
        "{what}: error {max:.2e} (mean {mean:.2e}), naive {naive_max:.2e} (mean {naive_mean:.2e})"
    );
}

/// Rows that are NaN by definition must be NaN; what else there is must be close.
pub fn compare<T: Element>(got: &[f32], naive: &[f32], want: &[f64], what: &str) {
    compare_within(step(T::DTYPE, Products::Float32), got, naive, want, what);
}

fn compare_within(step: f64, got: &[f32], naive: &[f32], want: &[f64], what: &str) {
    for (i, (x, y)) in got.iter().zip(want).enumerate() {
        assert_eq!(
            x.is_nan(),
            y.is_nan(),
            "{what}: element {i} is {x}, by definition {y}"
        );
    }
    let number = |x: &f32| if x.is_nan() { 0.0 } else { *x };
    let got: Vec<f32> = got.iter().map(number).collect();
    let naive: Vec<f32> = naive.iter().map(number).collect();
    let want: Vec<f64> = want
        .iter()
        .map(|y| if y.is_nan() { 0.0 } else { *y })
        .collect();
    assert_within(step, &got, &naive, &want, what);
}

pub fn shape(batch: usize, heads: usize, tokens: usize, dim: usize) -> Shape {
    Shape {
        batch,
        heads,
        kv_heads: heads,
        q_tokens: tokens,
        kv_tokens: tokens,
        head_dim: dim,
        v_dim: dim,
    }
}

/// Compares a call with its definition; at the best level of a machine that multiplies bfloat16 once more, in half precision
/// with such products.
pub fn check<T: Element>(p: Problem<T>, isa: Isa) {
    if isa == Isa::best() && bfloat16_products() {
        if T::DTYPE != DType::BF16 {
            check_once(p.in_bfloat16::<f16>(), isa);
        }
        if T::DTYPE != DType::F16 {
            check_once(p.in_bfloat16::<bf16>(), isa);
        }
    }
    check_once(p, isa);
}

fn check_once<T: Element>(mut p: Problem<T>, isa: Isa) {
    let (want, naive) = (p.oracle(), p.naive());
    let got = p.run(isa, &Sequential);
    let mask = p
        .mask
        .as_ref()
        .map(|mask| (mask.mask().kind(), mask.strides));
    let what = format!(
        "{:?} {:?} {:?} {:?} {mask:?} {isa:?} {:?}",
        T::DTYPE,
        p.kind,
        p.shape,
        p.band,
        p.products
    );
    let step = step(T::DTYPE, p.products);
    compare_within(step, &got.0, &naive.0, &want.out, &what);
    if let (Some(got), Some(naive), Some(want)) = (got.1, naive.1, want.residual) {
        let what = format!("residual, {what}");
        compare_within(step, &got, &naive, &want, &what);
    }
}
